"""Our models in transformers: importing this module registers AutoConfig, AutoModelForCausalLM and AutoTokenizer.

Needs the extra ``[hf]``. See docs/integrations.md.
"""

from __future__ import annotations

from hbll_seq.integrations.extras import without_extra

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError as error:
    raise without_extra(error, ("transformers",), "hf") from None

from hbll_seq.integrations.transformers_config import HBLLTransformersConfig
from hbll_seq.integrations.transformers_model import HBLLTransformersForCausalLM
from hbll_seq.integrations.transformers_tokenizer import HBLLTokenizer
from hbll_seq.models.hub_source import package_folder

#: the folder of the bundled model, whose name transformers would look up on the Hub
BUNDLED = str(package_folder())

__all__ = ["BUNDLED", "HBLLTokenizer", "HBLLTransformersConfig", "HBLLTransformersForCausalLM", "register"]


def register() -> None:
    """Make transformers' Auto classes know our folders; importing this module does it, and twice is no error."""
    AutoConfig.register(HBLLTransformersConfig.model_type, HBLLTransformersConfig, exist_ok=True)
    AutoModelForCausalLM.register(HBLLTransformersConfig, HBLLTransformersForCausalLM, exist_ok=True)
    AutoTokenizer.register(HBLLTransformersConfig, HBLLTokenizer, exist_ok=True)


register()
