"""``lmserve status``: whether the server runs, and with what."""

from __future__ import annotations

from typing import Any

import msgspec

from lmserve.cli.client import NoServer, connect
from lmserve.cli.options import ApiKey, AsJson, Url
from lmserve.cli.tables import format_size, print_json
from lmserve.cli.terminal import visible

EPILOG = """Examples:

\b
  lmserve status
  lmserve status --json
  lmserve status --url http://127.0.0.1:8080 || lmserve serve --port 8080"""
EXIT_OFF = 1


class _Health(msgspec.Struct):
    status: str
    reason: str | None = None


class _Version(msgspec.Struct):
    lmserve: str


def status(url: Url = "", api_key: ApiKey = "", as_json: AsJson = False) -> int:
    """Say whether the server is on, how it is, and which models are loaded. Exit code 1 when it is off."""
    with connect(url, api_key) as client:
        address = str(client.address)
        try:
            health = client.get("/health", _Health, accept=(503,))
        except NoServer:
            if as_json:
                print_json({"running": False, "url": address})
            else:
                print("Server: OFF")
            return EXIT_OFF
        version = client.get("/version", _Version).lmserve
        instances = [instance for model in client.models() for instance in model.loaded_instances]
    facts: dict[str, Any] = {
        "running": True,
        "url": address,
        "version": version,
        "healthy": health.status == "ok",
        "reason": health.reason,
        "models": sorted(instances, key=lambda instance: instance.id),
    }
    if as_json:
        print_json(facts)
    else:
        _print_facts(facts)
    return 0


def _print_facts(facts: dict[str, Any]) -> None:
    print(f"Server: ON ({facts['url']})")
    print(visible(f"Version: {facts['version']}"))
    print("Health: ok" if facts["healthy"] else visible(f"Health: unavailable ({facts['reason']})"))
    print("\nLoaded models" if facts["models"] else "\nNo models are loaded.")
    for instance in facts["models"]:
        known = [format_size(instance.device_memory_bytes)] if instance.device_memory_bytes else []
        known += [instance.state] if instance.state != "loaded" else []
        print(visible(f"  · {instance.id} - {', '.join(known)}"))
