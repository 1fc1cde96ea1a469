from lockstep.api import check as check
from lockstep.api import train as train
from lockstep.engines.base import Engine as Engine
from lockstep.records.samples import Sample as Sample
from lockstep.records.verdicts import Verdict as Verdict
from lockstep.training.trainer import Trainer as Trainer

__version__: str
PUBLIC: dict[str, str]
__all__ = ["Engine", "Sample", "Trainer", "Verdict", "__version__", "check", "train"]
