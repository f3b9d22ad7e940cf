"""Send requests to Shoal through Feast's SDK, and write the answers to stdout as JSON. Shoal is the SDK's online store
of type `remote`.

Run it with the interpreter of the peers' environment:

    python tests/feast/remote_client.py REPO URL [TOKEN CA] < REQUESTS

TOKEN is the token that the SDK would get from an identity provider. CA is the file with the certificate authority of
the server's certificate. REPO contains the registry. REQUESTS is a JSON list of {"features": [...] or "service": name,
"entities": {...}}. An answer is the result of `to_dict`, or {"error": the exception's class, "message": its text}.
"""

import json
import sys
from pathlib import Path
from typing import Any

from feast import FeatureStore, RepoConfig


def main() -> None:
    """Send all requests, and write the answers."""
    repo, url, *security = Path(sys.argv[1]), *sys.argv[2:]
    auth, cert = ({"type": "oidc", "token": security[0]}, security[1]) if security else ({"type": "no_auth"}, "")
    store = FeatureStore(
        config=RepoConfig(
            project="compared",
            registry=str(repo / "registry.db"),
            provider="local",
            online_store={"type": "remote", "path": url, "cert": cert},
            auth=auth,
            offline_store={"type": "file"},
            entity_key_serialization_version=3,
        )
    )
    json.dump([ask(store, request) for request in json.load(sys.stdin)], sys.stdout)


def ask(store: FeatureStore, request: dict[str, Any]) -> dict[str, Any]:
    try:
        features = store.get_feature_service(request["service"]) if "service" in request else request["features"]
        answer: dict[str, Any] = store.get_online_features(
            features=features,
            entity_rows=request["entities"],
            full_feature_names=request.get("full_feature_names", False),
        ).to_dict()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return answer


if __name__ == "__main__":
    main()
