"""Write views to DynamoDB tables, and load such tables into a local store."""
