"""Write views to tables of DynamoDB, and bring such tables local."""
