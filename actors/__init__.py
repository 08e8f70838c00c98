"""The actors that an engine consists of, and the messages that they take.

`TurnActor` is a Pykka actor without a thread of its own; the others are made by an engine. For your own tests,
`scopestate.actors.deterministic` has a dispatcher that replays any order of turns from a seed.
"""

from scopestate.actors.handler import HandlerActor
from scopestate.actors.router import EventRouter
from scopestate.actors.scope import ScopeActor
from scopestate.actors.snapshot import SnapshotActor
from scopestate.actors.turn import TurnActor
from scopestate.ops import messages

__all__ = ["EventRouter", "HandlerActor", "ScopeActor", "SnapshotActor", "TurnActor", "messages"]
