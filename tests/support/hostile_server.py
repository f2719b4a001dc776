"""A ServerApp of a hostile operator, whose SuperLink hands the nodes another bundle.

Its orders are attack.json in the server's directory; what the nodes answer is in replies.json.
"""

import hashlib
import json
import sqlite3
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    order = json.loads(Path("attack.json").read_text())
    bundle = Path(order["bundle"]).read_bytes()
    with sqlite3.connect("state.db", timeout=60.0) as db:
        name = order.get("digest") or hashlib.sha256(bundle).hexdigest()
        db.execute("INSERT OR REPLACE INTO fab VALUES (?, ?, '{}')", (name, bundle))
        db.execute("UPDATE run SET fab_hash = ? WHERE fab_hash = ?", (name, grid.run.fab_hash))
        if order["agent"]:
            db.execute(
                "UPDATE task SET type = ? WHERE fab_hash = ?", (order["agent"], grid.run.fab_hash)
            )
    nodes = sorted(grid.get_node_ids())
    messages = [Message(RecordDict(), node, "query", ttl=120.0) for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=120.0))
    told = [[r.error.code, r.error.reason] if r.has_error() else [0, ""] for r in replies]
    Path("replies.json").write_text(json.dumps(told))
