"""Requests and responses of every operation: plain dataclasses, so that the CLI need not import pydantic."""

from banger.api.models.base import *
from banger.api.models.catalogs import *
from banger.api.models.daemon import *
from banger.api.models.images import *
from banger.api.models.kernels import *
from banger.api.models.operations import *
from banger.api.models.ports import *
from banger.api.models.settings import *
from banger.api.models.streams import *
from banger.api.models.usage import *
from banger.api.models.vms import *
