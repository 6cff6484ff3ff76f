"""Face Fusion on the ControlNet pipeline of Stable Diffusion XL."""

from typing import TYPE_CHECKING

from diffusers import StableDiffusionXLControlNetPipeline

from .pipeline_controlnet import ControlNetFaces


if TYPE_CHECKING:  # diffusers' loader copies the siblings that a file names, and no others
    from .call_arguments import Call
    from .conditioner import Conditioner
    from .conditioner_face_snap import SnapConditioner
    from .conditioner_face_studio import StudioConditioner
    from .conditioner_reference import ReferenceConditioner
    from .conditioner_tokens import TokenConditioner
    from .control_landmarks import landmark_control
    from .control_pictures import control_picture
    from .face_adapter import FaceFusionAdapter
    from .face_attached import AttachedWeights
    from .face_attention import FaceFusionAttnProcessor
    from .face_defaults import FaceDefaults
    from .face_detectors import load_detector
    from .face_embedders import load_face_embedder
    from .face_errors import FaceFusionError
    from .face_familiarity import Familiarity
    from .face_files import read_tensors
    from .face_fusion_mixin import FaceFusionMixin
    from .face_identity import FaceIdentity
    from .face_images import detect_faces
    from .face_landmarkers import load_landmarker
    from .face_landmarks import draw_landmarks
    from .face_layout import layer_regions
    from .face_loader_mixin import FaceLoaderMixin
    from .face_metadata import without_metadata
    from .face_models import load_face_model
    from .face_ownership import sole_use
    from .face_people import face_axes
    from .face_pictures import upright_rgb
    from .face_places import place_people
    from .face_prior import load_prior
    from .face_recognisers import OnnxRecogniser
    from .face_self_attention import SelfAttentionReference
    from .face_single_file import load_single_file
    from .face_snap import FaceMixer
    from .face_snap_loader_mixin import FaceSnapLoaderMixin
    from .face_studio import FaceStudio
    from .face_studio_loader_mixin import FaceStudioLoaderMixin
    from .face_style import unit_length
    from .guidance_interval import GuidanceInterval
    from .joint_attention import joint_attention
    from .reference_pass import capture_hidden_states
    from .unet_family import base_family


class StableDiffusionXLControlNetFaceFusionPipeline(ControlNetFaces, StableDiffusionXLControlNetPipeline):
    """`StableDiffusionXLControlNetPipeline` with people's faces, see `pipeline_controlnet.ControlNetFaces`."""
