"""Face Fusion: identity-preserving image synthesis by joint attention over text and face (arXiv 2409.19111)."""

import importlib
from typing import Any


__version__ = "0.1.0"

# Imported when first asked for: `import face_fusion_pipeline` stays instant for the command line.
_EXPORTS = {
    "embedded_model": "generation.avatar_model",
    "load_avatar_face_model": "avatars.face_model",
    "SnapIdentity": "conditioner_face_snap",
    "StudioIdentity": "conditioner_face_studio",
    "Conditioner": "conditioner",
    "register_conditioner": "conditioner",
    "landmark_control": "control_landmarks",
    "register_control": "control_pictures",
    "AdapterMetadata": "face_adapter",
    "FaceFusionAdapter": "face_adapter",
    "create_adapter": "face_adapter",
    "face_fused_unet": "training.fused_unet",
    "load_adapter": "face_adapter",
    "save_adapter": "face_adapter",
    "FaceFusionAttnProcessor": "face_attention",
    "FaceDefaults": "face_defaults",
    "control_depth": "control_pictures",
    "depth_image": "control_pictures",
    "load_detector": "face_detectors",
    "AdapterMismatchError": "face_errors",
    "FaceAxesError": "face_errors",
    "FaceFusionError": "face_errors",
    "FaceTooSmallError": "face_errors",
    "IdentityMismatchError": "face_errors",
    "InvalidLayoutError": "face_errors",
    "InvalidPromptError": "face_errors",
    "InvalidScaleError": "face_errors",
    "ModelNotFoundError": "face_errors",
    "NoFaceError": "face_errors",
    "LandmarksError": "face_errors",
    "SeveralFacesError": "face_errors",
    "UnreadableImageError": "face_errors",
    "FaceFusionMixin": "face_fusion_mixin",
    "FaceIdentity": "face_identity",
    "FacePhoto": "generation.photos",
    "detect_faces": "face_images",
    "load_image": "face_pictures",
    "locate_face": "generation.photos",
    "prepare_face": "generation.photos",
    "Pose": "face_landmarks",
    "draw_landmarks": "face_landmarks",
    "FaceFit": "face_models",
    "FaceModel": "face_models",
    "LinearFaceModel": "face_models",
    "load_face_model": "face_models",
    "recombined": "face_models",
    "with_mirrored": "generation.photos",
    "SelfAttentionReference": "face_self_attention",
    "contact_sheet": "generation.contact_sheet",
    "has_watermark": "generation.watermark",
    "record_attention": "inspection.attention_maps",
    "GuidanceInterval": "guidance_interval",
    "StableDiffusionFaceFusionPipeline": "pipeline",
    "StableDiffusionControlNetFaceFusionPipeline": "pipeline_controlnet",
    "StableDiffusionImg2ImgFaceFusionPipeline": "pipeline_img2img",
    "StableDiffusionInpaintFaceFusionPipeline": "pipeline_inpaint",
    "StableDiffusionXLFaceFusionPipeline": "pipeline_xl",
    "StableDiffusionXLControlNetFaceFusionPipeline": "pipeline_xl_controlnet",
    "StableDiffusionXLImg2ImgFaceFusionPipeline": "pipeline_xl_img2img",
    "StableDiffusionXLInpaintFaceFusionPipeline": "pipeline_xl_inpaint",
    "capture_hidden_states": "reference_pass",
}
_EARLIER = {"LateGuidance": "GuidanceInterval"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EARLIER:
        from .face_errors import renamed

        [name] = renamed({name: None}, _EARLIER, __name__)
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
