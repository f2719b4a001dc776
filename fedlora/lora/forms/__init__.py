"""The adapter forms that PEFT does not have, by the name that lora.form gives them."""

from fedlora.lora.forms.base import OwnForm
from fedlora.lora.forms.lora_xs import LoraXS
from fedlora.lora.forms.paca import Paca
from fedlora.lora.forms.pmss import Pmss

OWN: dict[str, type[OwnForm]] = {
    "lora-xs": LoraXS,
    "pmss": Pmss,
    "paca": Paca,
}
