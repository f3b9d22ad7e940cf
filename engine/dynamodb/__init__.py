"""Views that are kept in tables of DynamoDB, or of another server that speaks its interface."""
