"""An OpenAI-compatible server over the engine, with a playground that shows depth."""

from mor.server.app import create_app
from mor.server.loop import EngineLoop
from mor.server.serve import DrainingServer, make_server

__all__ = ["DrainingServer", "EngineLoop", "create_app", "make_server"]
