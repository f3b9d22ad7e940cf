"""The Spark session an export runs in: spark-submit's or the caller's if there is one, else a quiet one of its own."""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import SparkFailed

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_INSTALL_SPARK = "pip install 'shoal[spark]'"
_INSTALL_JAVA = "apt-get install openjdk-17-jre-headless"

_OWN_SESSION = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
_OWN_LOCAL_SESSION = {
    "spark.driver.host": "localhost",
    "spark.driver.bindAddress": "127.0.0.1",
    # A few per core of one machine; adaptive execution merges them when there is little data.
    "spark.sql.shuffle.partitions": "32",
}

_EXPORT_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.adaptive.enabled": "true",
    # The JVM never compiles a longer method. Spark makes one of that length of about 45 features, and it would take
    # three times as long as several short ones.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    "spark.sql.files.maxRecordsPerFile": "0",
    "spark.sql.parquet.compression.codec": "zstd",
    # As small as at Spark's default of 3 for hashes and features, and a quarter faster to write.
    "parquet.compression.codec.zstd.level": "1",
    # So small that a loader holds few rows at a time, and so large that a page of each column is still worth reading.
    "parquet.block.row.count.limit": "131072",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.writeLegacyFormat": "false",
    # Spark refuses a file with timestamps of nanoseconds, as pandas may write it; a query can make them of integers.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
}


def spark_session(master: str | None = None, packages: Sequence[str] = ()) -> "SparkSession":
    """The session to export or stream in.

    One that runs already, or that spark-submit asked for, is used as it is. Otherwise one is started on `master`
    (`local[*]` if None), with packages that Spark fetches (GROUP:ARTIFACT:VERSION), and its JVM writes nothing to the
    terminal.

    Raises:
        SparkFailed: pyspark or Java is missing or too old, Spark does not start, or it runs on another master already.
    """
    try:
        import pyspark
        from pyspark.sql import DataFrame, SparkSession
    except ImportError as error:
        raise SparkFailed(f"an export needs pyspark, which is not importable ({error}); {_INSTALL_SPARK}") from error
    from spark_export.spark_errors import raised_as

    if not hasattr(DataFrame, "repartitionById"):
        raise SparkFailed(f"an export needs pyspark 4.1 or newer, found {pyspark.__version__}; {_INSTALL_SPARK}")
    with warnings.catch_warnings():
        # pyspark warns of the pandas that is installed; nothing here uses pandas.
        warnings.simplefilter("ignore", FutureWarning)
        if pyspark.SparkContext._active_spark_context is None and "PYSPARK_GATEWAY_PORT" not in os.environ:
            _start(master or "local[*]", packages)
        elif packages:
            raise SparkFailed("Spark runs already, so packages come too late; give them to spark-submit as --packages")
        with raised_as(SparkFailed, f"Spark does not answer{f' on {master}' if master else ''}"):
            session = SparkSession.builder.getOrCreate()
    found = session.sparkContext.master
    if master not in (None, found):
        raise SparkFailed(f"Spark runs on {found} already, so it cannot be started on {master}; leave --master out")
    return session


def export_session(spark: "SparkSession") -> "SparkSession":
    """A session with the tables, temporary views and settings of `spark`, but in which files are written in one way."""
    from pyspark.sql import SparkSession

    # pyspark has this only for Spark Connect; a new session would lack the caller's temporary views.
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

    from spark_export.spark_errors import brief

    for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):
        # They write every error that is raised to stderr as well, with its Java stack.
        PySparkLogger.getLogger(name).disabled = True
    java = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if not shutil.which(java):
        raise SparkFailed(f"Spark needs Java 17 or newer, but there is no {java}; {_INSTALL_JAVA}")
    if master.startswith("local"):
        # Its tasks are to run in this Python: the one that `python3` means may have nothing installed.
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
