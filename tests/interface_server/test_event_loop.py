"""One loop for asyncio and Twisted, in a process of its own: a reactor is installed once and for ever."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(program):
    """Run a program that ends with ``outcome = event_loop.run(main)``."""
    code = "import asyncio, logging, sys\nlogging.basicConfig(format='%(levelname)s %(name)s %(message)s')\n"
    code += "from interface_server import event_loop\n" + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_both_sides_share_one_loop_and_the_result_comes_back():
    result = run(
        """
        async def main(reactor):
            from twisted.internet import defer, reactor as installed
            assert installed is reactor
            fired = defer.Deferred()
            reactor.callLater(0, fired.callback, 7)
            return await fired.asFuture(asyncio.get_running_loop())

        sys.exit(event_loop.run(main))
        """
    )
    assert (result.returncode, result.stderr) == (7, "")


def test_what_main_raises_is_raised():
    result = run(
        """
        async def main(reactor):
            raise LookupError("odd")

        try:
            event_loop.run(main)
        except LookupError as error:
            print("raised", error)
        """
    )
    assert (result.stdout, result.stderr) == ("raised odd\n", "")


def test_what_is_left_is_cancelled_and_its_errors_are_logged():
    result = run(
        """
        async def stubborn():
            try:
                await asyncio.sleep(60)
            finally:
                raise OSError("while cancelled")

        async def main(reactor):
            main.tasks = [asyncio.create_task(stubborn()), asyncio.create_task(asyncio.sleep(60))]
            await asyncio.sleep(0)
            return 0

        sys.exit(event_loop.run(main))
        """
    )
    assert result.returncode == 0
    assert "ERROR trunkline.interface a task failed while it was cancelled" in result.stderr
    assert "while cancelled" in result.stderr


def test_errors_in_callbacks_of_both_sides_reach_the_log():
    result = run(
        """
        async def main(reactor):
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
            reactor.callLater(0, lambda: {}["missing"])
            done = asyncio.get_running_loop().create_future()
            reactor.callLater(0.01, done.set_result, None)
            await done
            return 0

        sys.exit(event_loop.run(main))
        """
    )
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert len([line for line in lines if "trunkline.interface" in line]) == 2
    assert "ZeroDivisionError: division by zero" in lines
    assert "KeyError: 'missing'" in result.stderr


def test_a_socket_that_is_reset_right_behind_its_data_is_lost():
    """uvloop polls such a socket once more and never again; the data hide the error from that one read."""
    result = run(
        """
        async def main(reactor):
            import socket, struct
            from twisted.internet.protocol import Factory, Protocol

            lost = asyncio.get_running_loop().create_future()

            class Silent(Protocol):
                def dataReceived(self, data):
                    print("received", data)

                def connectionLost(self, reason):
                    lost.set_result(reason.type.__name__)

            port = reactor.listenTCP(0, Factory.forProtocol(Silent), interface="127.0.0.1")
            client = socket.create_connection(("127.0.0.1", port.getHost().port))
            client.sendall(b"data")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            print(await asyncio.wait_for(lost, 30))
            await port.stopListening().asFuture(asyncio.get_running_loop())
            return 0

        sys.exit(event_loop.run(main))
        """
    )
    assert (result.returncode, result.stdout) == (0, "received b'data'\nConnectionLost\n"), result.stderr
