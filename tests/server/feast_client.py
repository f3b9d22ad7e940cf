"""Query a server with the client of Feast's package: `PYTHON_OF_FEAST feast_client.py ADDRESS`.

The program reads a JSON list of requests from stdin and writes a JSON list of answers to stdout, each in the JSON
format of Protocol Buffers. It runs in the environment where Feast is installed, and has no access to Shoal's code.
"""

import json
import sys

import grpc
from feast.protos.feast.serving import GrpcServer_pb2_grpc, ServingService_pb2, ServingService_pb2_grpc
from google.protobuf.json_format import MessageToDict, ParseDict


def main() -> None:
    with grpc.insecure_channel(sys.argv[1]) as channel:
        serving = ServingService_pb2_grpc.ServingServiceStub(channel)
        listening = GrpcServer_pb2_grpc.GrpcFeatureServerStub(channel)
        answers = []
        for document in json.load(sys.stdin):
            request = ParseDict(document, ServingService_pb2.GetOnlineFeaturesRequest())
            answer = serving.GetOnlineFeatures(request, timeout=30)
            assert listening.GetOnlineFeatures(request, timeout=30) == answer
            answers.append(MessageToDict(answer, preserving_proto_field_name=True))
        assert serving.GetFeastServingInfo(ServingService_pb2.GetFeastServingInfoRequest(), timeout=30).version
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
