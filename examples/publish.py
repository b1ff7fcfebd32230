"""Say something in a room of the chat from a shell, a cron job, or any other program that reaches the broker.

TRUNKLINE_REDIS=redis://localhost python examples/publish.py lobby "The build is green"

(`trunkline serve` prints the address of its embedded broker when it starts.)
"""

import json
import sys

from channel_layer import Publisher


def main(argv):
    if len(argv) != 3:
        print("usage: publish.py ROOM TEXT", file=sys.stderr)
        return 2
    room, text = argv[1:]
    line = json.dumps({"kind": "said", "id": "publish.py", "name": "publish.py", "text": text})
    try:
        with Publisher() as publisher:
            publisher.group_send(f"chat.{room}", {"type": "websocket.send", "text": line})
    except (RuntimeError, ConnectionError, ValueError) as error:  # no address, no broker there, not an address
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
