"""The commands that only read: status, lookup and those about Feast. `terminal` prints for all commands."""
