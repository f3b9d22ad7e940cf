"""Write an entry's files and publish it, in a directory or in S3."""
