"""TCP passed through to a port of the loopback: counted, and cut like a cable on demand."""

import select
import socket
import struct
import threading


class Relay:
    """Passes on what connects to `port`.

    While it is cut, nothing passes and nothing is refused, as with a cable pulled out: what was
    under way waits in the kernel's buffers.
    """

    def __init__(self, to: int) -> None:
        self.to = to
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.up = self.down = 0
        self.lock = threading.Lock()
        self.whole = threading.Event()
        self.whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def cut(self) -> None:
        self.whole.clear()

    def mend(self) -> None:
        self.whole.set()

    def close(self) -> None:
        self.mend()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        self.whole.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self.to))
        except OSError:  # as if nothing listened here: refused, not answered and hung up on
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.close()
            return
        with near, far:
            while True:
                ready, _, _ = select.select([near, far], [], [])
                self.whole.wait()
                for source in ready:
                    try:
                        data = source.recv(1 << 16)
                        (far if source is near else near).sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    with self.lock:
                        if source is near:
                            self.up += len(data)
                        else:
                            self.down += len(data)
