"""Face Fusion: identity-preserving image synthesis by joint attention over text and face (arXiv 2409.19111)."""

import importlib
from typing import Any


__version__ = "0.1.0"

# Imported when first asked for: `import face_fusion_pipeline` stays instant for the command line.
_EXPORTS = {
    "AdapterMetadata": "face_adapter",
    "FaceDefaults": "face_defaults",
    "FaceFusionAdapter": "face_adapter",
    "create_adapter": "face_adapter",
    "embedded_model": "avatar_model",
    "face_fused_unet": "face_adapter",
    "load_adapter": "face_adapter",
    "prepare_face": "face_images",
    "save_adapter": "face_adapter",
    "FaceFusionAttnProcessor": "face_attention",
    "FaceFusionError": "face_errors",
    "FaceFusionMixin": "face_fusion_mixin",
    "FaceIdentity": "face_identity",
    "capture_hidden_states": "face_identity",
    "LateGuidance": "late_guidance",
    "SelfAttentionReference": "face_self_attention",
    "StableDiffusionFaceFusionPipeline": "pipeline",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
