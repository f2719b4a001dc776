"""The adapter forms that PEFT does not have, by the name that lora.form gives them."""

from fedlora.lora.forms.across_layers import LoTR, MSPLoRA
from fedlora.lora.forms.base import OwnForm
from fedlora.lora.forms.loldu import LoLDU
from fedlora.lora.forms.lora_xs import LoraXS
from fedlora.lora.forms.melora import MELoRA
from fedlora.lora.forms.moslora import MoSLoRA
from fedlora.lora.forms.nested import LoraMini, NoRA
from fedlora.lora.forms.paca import Paca
from fedlora.lora.forms.pmss import Pmss
from fedlora.lora.forms.submatrix import SMT, LoSiA

OWN: dict[str, type[OwnForm]] = {
    "lora-xs": LoraXS,
    "pmss": Pmss,
    "paca": Paca,
    "loldu": LoLDU,
    "losia": LoSiA,
    "smt": SMT,
    "melora": MELoRA,
    "moslora": MoSLoRA,
    "lora-mini": LoraMini,
    "nora": NoRA,
    "lotr": LoTR,
    "msplora": MSPLoRA,
}
