"""Export roots: manifests and the logs of the views, in a directory or in S3. Use `ExportRoot` and `Manifest`."""
