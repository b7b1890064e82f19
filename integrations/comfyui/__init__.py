"""ComfyUI finds the node here."""

from .nodes import LoraDaeEnhancement

NODE_CLASS_MAPPINGS = {"LoraDaeEnhancement": LoraDaeEnhancement}
NODE_DISPLAY_NAME_MAPPINGS = {"LoraDaeEnhancement": "LoRA-DAE enhancement"}
