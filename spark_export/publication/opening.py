"""Open the staging of a run, a state, or files of rows, in a directory or in S3.

The module for each kind of root is imported when it is needed, because S3 needs boto3, an optional dependency.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from pyspark.sql import DataFrame, SparkSession

from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.publication.staging import Staging


def staging(root: ExportRoot, view: str, run: str, seq: int) -> AbstractContextManager[Staging]:
    """Return the staging of a run that is to publish the entry `seq`, as a context manager. On entry, it also removes
    the files that earlier runs abandoned.

    Raises:
        RootNotWritable: the root cannot be written.
    """
    if root.is_directory:
        from shoal.spark_export.publication.in_directory import directory_staging

        return directory_staging(root, view, run, seq)
    from shoal.spark_export.publication.in_s3 import s3_staging

    return s3_staging(root, view, run, seq)


def read_state(root: ExportRoot, spark: SparkSession, state: str, columns: str) -> DataFrame:
    """Return an earlier run's ledger. `state` is its directory in the root, `columns` its schema as DDL."""
    if root.is_directory:
        from shoal.spark_export.publication.in_directory import read_directory

        return read_directory(spark, root.path / state, columns)
    from shoal.spark_export.publication.in_s3 import read_prefix

    return read_prefix(root, spark, state, columns)


def read_parts(root: ExportRoot, spark: SparkSession, names: Sequence[str], columns: str) -> DataFrame:
    """Return the rows of files, given by their names in the root. `columns` is the schema as DDL; a column that a file
    lacks is null. The additional column `FILE` contains a path or URL that ends with the name of the row's file."""
    if root.is_directory:
        from shoal.spark_export.publication.in_directory import read_files

        return read_files(spark, [root.path / name for name in names], columns)
    from shoal.spark_export.publication.in_s3 import read_objects

    return read_objects(root, spark, names, columns)
