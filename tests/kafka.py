"""A real Kafka broker of one node, from which streams read. `make .kafka/installed` fetches it."""

import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.server.serving import eventually

BROKER = Path(__file__).parent.parent / ".kafka"
"""The directory of the broker's jars."""
CONNECTOR = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"
"""The package with which Spark reads Kafka. The one for 4.2 also works with the neighbouring versions of Spark."""

_CLUSTER = "c2hvYWwtc2hvYWwtc2hvYQ"
_SETTINGS = """
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={directory}/logs
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
auto.create.topics.enable=false
"""


@contextmanager
def broker() -> Iterator[str]:
    """Run a broker without topics, and yield its address in the form of kafka.bootstrap.servers."""
    with tempfile.TemporaryDirectory(prefix="kafka-") as directory:
        port, controller = _free_ports()
        settings = Path(directory) / "server.properties"
        log = Path(directory) / "log"
        settings.write_text(_SETTINGS.format(port=port, controller=controller, directory=directory))
        java = ["java", "-Xmx512m", "-cp", f"{BROKER}/*"]
        formatting = ["kafka.tools.StorageTool", "format", "--cluster-id", _CLUSTER, "--config", str(settings)]
        subprocess.run([*java, *formatting], check=True, capture_output=True)
        with log.open("w") as output:
            process = subprocess.Popen([*java, "kafka.Kafka", str(settings)], stdout=output, stderr=output)
        try:
            address = f"127.0.0.1:{port}"
            eventually(
                lambda: _answers(process, address), lambda: f"an answer from Kafka; its log is\n{log.read_text()}"
            )
            yield address
        finally:
            process.kill()
            process.wait()


def create_topic(address: str, name: str, partitions: int) -> None:
    """Create a topic."""
    admin = AdminClient({"bootstrap.servers": address})
    for created in admin.create_topics([NewTopic(name, partitions, 1)]).values():
        created.result(30)


def produce(address: str, topic: str, values: Iterable[bytes]) -> None:
    """Send records to the partitions of a topic. All records are in the log when this returns."""
    producer = Producer({"bootstrap.servers": address})
    for number, value in enumerate(values):
        producer.produce(topic, value, key=str(number))
    assert producer.flush(30) == 0


def _answers(process: "subprocess.Popen[bytes]", address: str) -> bool:
    assert process.poll() is None, "Kafka did not start"
    try:
        return bool(AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=2).brokers)
    except KafkaException:
        return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]
