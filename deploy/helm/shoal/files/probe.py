"""Probe the server in this container, with a client certificate: python -c PROGRAM PORT PATH."""

import http.client
import ssl
import sys

# The server is in the same container, so its certificate and host name need no verification.
context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
context.load_cert_chain("/etc/shoal/client/tls.crt", "/etc/shoal/client/tls.key")
server = http.client.HTTPSConnection("127.0.0.1", int(sys.argv[1]), timeout=2, context=context)
server.request("GET", sys.argv[2])
answer = server.getresponse()
print(answer.status, answer.read().decode(errors="replace"))
sys.exit(answer.status != 200)
