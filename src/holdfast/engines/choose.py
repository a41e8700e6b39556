"""Open an engine by its name; the model itself is the default."""

from holdfast.engines.port import Engine, HfEngine
from holdfast.engines.settings import EngineSettings
from holdfast.models.model import Adapter


def open_engine(settings: EngineSettings, adapter: Adapter) -> Engine:
    """Open an engine, which draws what the model would draw; nothing is asked yet.

    `adapter`: The model, whose tokenizer, template and stop tokens hold for it.
    """
    # Imported here so that each engine loads only what it needs itself.
    if settings.engine == "vllm":
        from holdfast.engines.vllm import VllmEngine

        return VllmEngine(settings, adapter)
    if settings.engine == "server":
        from holdfast.engines.serving.server import ServerEngine

        return ServerEngine(settings, adapter)
    return HfEngine(adapter)
