"""Writes a model with latent attention (DeepSeek-V2's) and random weights into a folder."""

import sys
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

VOCABULARY = 512


def main(folder: Path) -> None:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        first_k_dense_replace=3,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=1,
    )
    model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
