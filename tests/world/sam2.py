"""A small SAM 2.1 with random weights, in the format in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Sam2VideoConfig, Sam2VideoModel

SAM2_SIZES = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 1, 2, 4],
            "window_size_per_stage": [8, 4, 4, 2],
            "window_positional_embedding_background_size": [4, 4],
            "global_attention_blocks": [3],
            "image_size": [64, 64],
        },
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 128,
    },
    "prompt_encoder_config": {"hidden_size": 128, "image_size": 64, "mask_input_channels": 8},
    "mask_decoder_config": {
        "hidden_size": 128,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}


def write_sam2(folder: Path) -> Path:
    """Write a SAM 2.1 for videos, as facebook publishes it, with an image of 64 px; return its folder.

    It sees the object in every frame: a random one would in all or in none, and draw no mask in the latter.
    """
    torch.manual_seed(0)
    config = Sam2VideoConfig(
        **SAM2_SIZES,
        image_size=64,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,  # the memory attention reads these, and pointers of twice as many
        mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
    )
    model = Sam2VideoModel(config)
    with torch.no_grad():
        for learned in (
            model.no_memory_embedding,
            model.no_memory_positional_encoding,
            model.memory_temporal_positional_encoding,
            model.no_object_pointer,
            model.occlusion_spatial_embedding_parameter,
        ):
            torch.nn.init.normal_(learned)  # they start at zero
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(2.0)
        model.shared_image_embedding.positional_embedding.copy_(
            model.prompt_encoder.shared_embedding.positional_embedding
        )
    model.save_pretrained(folder)
    processor = {"image_processor_type": "Sam2ImageProcessorFast", "processor_class": "Sam2VideoProcessor"}
    tree = processor | {"size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(tree, indent=2))
    return folder
