from lorikit.api import chat as chat
from lorikit.api import check as check
from lorikit.api import generate as generate
from lorikit.api import stream as stream
from lorikit.config import RunConfig as RunConfig
from lorikit.config import load_config as load_config
from lorikit.data.values import Message as Message
from lorikit.errors import ConfigError as ConfigError
from lorikit.errors import DataError as DataError
from lorikit.errors import LorikitError as LorikitError
from lorikit.errors import ModelError as ModelError
from lorikit.export.merge import merge as merge
from lorikit.infer.generate import Answer as Answer
from lorikit.infer.session import Session as Session
from lorikit.infer.session import open_run as open_run
from lorikit.model.engine import Sampling as Sampling
from lorikit.report.compare import compare as compare
from lorikit.train.loop import train as train
from lorikit.train.plan import plan as plan

__version__: str
