"""The Spark session of an export: the session of spark-submit or of the caller, otherwise a new, quiet session."""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.engine.base.errors import SparkFailed

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_INSTALL_SPARK = "pip install 'shoal[spark]'"
_INSTALL_JAVA = "apt-get install openjdk-17-jre-headless"

_OWN_SESSION = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
_OWN_LOCAL_SESSION = {
    "spark.driver.host": "localhost",
    "spark.driver.bindAddress": "127.0.0.1",
    # A few partitions per core of one machine; adaptive execution merges them when there is little data.
    "spark.sql.shuffle.partitions": "32",
}

_EXPORT_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.adaptive.enabled": "true",
    # The JVM never compiles a method longer than 8000 bytes. From about 45 features on, Spark would generate such a
    # method, which takes three times as long as several short methods.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    "spark.sql.files.maxRecordsPerFile": "0",
    "spark.sql.parquet.compression.codec": "zstd",
    # For hashes and features, files are as small as at Spark's default level of 3, and writing is a quarter faster.
    "parquet.compression.codec.zstd.level": "1",
    # Row groups are small enough that a loader holds few rows at a time, and large enough that a page of each column is
    # worth reading.
    "parquet.block.row.count.limit": "131072",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.writeLegacyFormat": "false",
    # Keep partition columns as text: `shoal.spark_export.source.partition_texts` converts them to the types in
    # views.yaml.
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    # Otherwise Spark refuses a file with timestamps in nanoseconds, which pandas may write. With this setting, Spark
    # reads such timestamps as integers, and a query can convert these to timestamps.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
}


def spark_session(master: str | None = None, packages: Sequence[str] = ()) -> "SparkSession":
    """Return the session for an export or a stream.

    If a session is already running, or spark-submit started the process, use that session unchanged. Otherwise start
    Spark on `master` (`local[*]` if None) with the given packages (GROUP:ARTIFACT:VERSION), which Spark downloads. The
    JVM of the new session writes nothing to the terminal.

    Raises:
        SparkFailed: pyspark or Java is missing or too old, Spark does not start, Spark already runs on another master,
            or packages were given and Spark already runs.
    """
    try:
        import pyspark
        from pyspark.sql import DataFrame, SparkSession
    except ImportError as error:
        raise SparkFailed(f"an export needs pyspark, which is not importable ({error}); {_INSTALL_SPARK}") from error
    from shoal.spark_export.source.spark_errors import raised_as

    if not hasattr(DataFrame, "repartitionById"):
        raise SparkFailed(f"an export needs pyspark 4.1 or newer, found {pyspark.__version__}; {_INSTALL_SPARK}")
    with warnings.catch_warnings():
        # pyspark warns about the installed version of pandas, but nothing here uses pandas.
        warnings.simplefilter("ignore", FutureWarning)
        if pyspark.SparkContext._active_spark_context is None and "PYSPARK_GATEWAY_PORT" not in os.environ:
            _start(master or "local[*]", packages)
        elif packages:
            raise SparkFailed("Spark runs already and cannot load packages; give them to spark-submit as --packages")
        with raised_as(SparkFailed, f"Spark does not answer{f' on {master}' if master else ''}"):
            session = SparkSession.builder.getOrCreate()
    found = session.sparkContext.master
    if master not in (None, found):
        raise SparkFailed(f"Spark runs on {found} already, so it cannot be started on {master}; leave --master out")
    return session


def export_session(spark: "SparkSession") -> "SparkSession":
    """Return a clone of a session. The clone has the session's tables, temporary views and settings, but Shoal's own
    settings take precedence."""
    from pyspark.sql import SparkSession

    # pyspark can clone a session only in Spark Connect. A new session would lack the caller's temporary views.
    session = SparkSession(spark.sparkContext, spark._jsparkSession.cloneSession())
    for name, value in _EXPORT_SETTINGS.items():
        session.conf.set(name, value)
    return session


def _start(master: str, packages: Sequence[str]) -> None:
    from py4j.protocol import Py4JError
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkException
    from pyspark.java_gateway import launch_gateway
    from pyspark.logger import PySparkLogger

    from shoal.spark_export.source.spark_errors import brief

    for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        # These loggers also write every raised error to stderr, with its Java stack trace.
        PySparkLogger.getLogger(name).disabled = True
    java = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if not shutil.which(java):
        raise SparkFailed(f"Spark needs Java 17 or newer, but there is no {java}; {_INSTALL_JAVA}")
    if master.startswith("local"):
        # Run Spark's tasks in the current Python. The Python that `python3` starts may lack the required packages.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    settings = _OWN_SESSION | (_OWN_LOCAL_SESSION if master.startswith("local") else {})
    if packages:
        settings["spark.jars.packages"] = ",".join(packages)
    conf = SparkConf().setMaster(master).setAppName("shoal").setAll(list(settings.items()))
    with tempfile.TemporaryFile() as output:
        try:
            gateway = launch_gateway(conf, {"stdout": output, "stderr": output})  # type: ignore[no-untyped-call]
            SparkContext(conf=conf, gateway=gateway)
        except (PySparkException, Py4JError) as error:
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
            said = next((line.strip() for line in lines if "Exception" in line or "Error" in line), "")
            raise SparkFailed(f"Spark did not start on {master}: {said or brief(error)}") from error
