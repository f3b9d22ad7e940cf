"""Views in tables of DynamoDB, or of another server with the same interface."""
