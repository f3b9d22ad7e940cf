"""All steps of the demo, in order."""

from pyspark.sql import SparkSession

from demo import server
from demo.client import Client
from demo.setting import Setting
from demo.steps.closing import close, commands_about, requests_about
from demo.steps.ranking import load_store, measure, rank
from demo.steps.replaying import replay
from demo.steps.sourcing import prepare_source
from demo.steps.updating import update
from demo.steps.verifying import verify
from shoal.spark_export.source.session import spark_session

_SPARK_SETTINGS = {"spark.sql.session.timeZone": "UTC", "spark.sql.shuffle.partitions": "4"}


def tell(setting: Setting) -> None:
    """Run all steps. If a step fails, raise its error."""
    with setting.terminal.working("starting Spark"):
        spark = _session()
    try:
        setting.workspace.start_over()
        prepare_source(setting, spark)
        replay(setting, spark)
        load_store(setting)
        port = server.free_port()
        with server.serving(setting.workspace, port), Client(port) as client:
            ranker = rank(setting, client)
            measure(setting, port, ranker)
            verify(setting, client, setting.calendar.replayed[-1])
            update(setting, spark, port, client, ranker)
            verify(setting, client, setting.calendar.live)
            example = ranker.example(client)
            requests = requests_about(example, client, port)
        commands = commands_about(example, setting)
    finally:
        spark.stop()
    close(setting, commands, requests, port)


def _session() -> SparkSession:
    spark = spark_session()
    for name, value in _SPARK_SETTINGS.items():
        spark.conf.set(name, value)
    return spark
