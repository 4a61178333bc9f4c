"""Schemathesis, in an environment of its own, against a running server's OpenAPI document: nothing sent may be a 5xx, and every
answer is one that the document tells of.

    python benchmarks/serve_fuzz.py URL SCHEMATHESIS [--max-examples 100]

URL is what `lorikit serve` printed, of a tiny model that takes 32768 tokens; SCHEMATHESIS the command (pip install
schemathesis). The document is given the names of the served models, so that requests get past the 404 of an unknown one, and
turns of users alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("schemathesis")
    parser.add_argument("--max-examples", type=int, default=100)
    parser.add_argument("--checks", default="all", help="as schemathesis names them, such as not_a_server_error")
    given = parser.parse_args()

    def get(path):
        with urllib.request.urlopen(given.url + path) as response:
            return json.load(response)

    document, names = get("/openapi.json"), [model["id"] for model in get("/v1/models")["data"]]
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["enum"] = names
    # No schema can say that the last turn is the user's: here all are.
    document["components"]["schemas"]["ChatMessage"]["properties"]["role"]["enum"] = ["user"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(document))
        command = [given.schemathesis, "run", str(path), "--url", given.url, "--checks", given.checks]
        command += ["--request-timeout", "120"]  # an answer may be 32768 tokens long
        done = subprocess.run([*command, "--max-examples", str(given.max_examples)], check=False, cwd=folder)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
