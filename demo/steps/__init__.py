"""The steps of the demo, in the order of `demo.story`: each does something, and prints what it did and measured."""
