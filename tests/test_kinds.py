"""Kinds of matrices by their names, as real models have them (transformers 5.23, timm 1.0, diffusers 0.42)."""

import pytest

from sosd_fast.matrices import kind

NAMES = {
    "attention": """
        h.0.attn.c_attn.weight[q] h.0.attn.c_proj.weight model.layers.3.self_attn.q_proj.weight
        layers.0.self_attn.in_proj_weight[k] layers.0.multihead_attn.out_proj.weight layers.0.attention.wq.weight
        bert.encoder.layer.0.attention.self.query.weight bert.encoder.layer.0.attention.output.dense.weight
        deberta.encoder.layer.0.attention.self.query_proj.weight distilbert.transformer.layer.0.attention.q_lin.weight
        encoder.block.0.layer.0.SelfAttention.q.weight decoder.block.0.layer.1.EncDecAttention.o.weight
        decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight
        model.decoder.layers.0.encoder_attn.v_proj.weight model.layers.0.attn.Wqkv.weight[v]
        model.layers.0.attn.Wo.weight gpt_neox.layers.0.attention.query_key_value.weight[q]
        gpt_neox.layers.0.attention.dense.weight transformer.h.0.self_attention.dense.weight
        transformer.layer.0.rel_attn.q model.layers.0.self_attn.kv_a_proj_with_mqa.weight
        down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight
        transformer_blocks.0.attn.add_k_proj.weight mid_block.attentions.0.to_q.weight blocks.0.attn.qkv.weight[q]
        stages.0.blocks.0.attn_grid.attn.proj.weight rwkv.blocks.0.attention.output.weight
        encoder.layer.0.crossattention.output.dense.weight layers.0.q_proj.weight layers.0.wo.weight
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
        layers.0.self_attn.out_proj.weight model.layers.0.self_attn.output_proj.weight
        encoder.x_layers.0.lang_self_att.output.dense.weight stages.1.blocks.3.e_mhsa.proj.weight
        funnel.encoder.blocks.0.0.attention.q_head.weight serial_blocks1.0.factoratt_crpe.proj.weight
        model.layers.0.self_attn.rel_logits_proj.proj layers.0.attention.gru_rel_pos_linear.weight
        base_model.model.h.0.attn.c_attn.base_layer.weight[q]
    """,
    "mlp": """
        h.0.mlp.c_proj.weight model.layers.3.mlp.down_proj.weight layers.0.linear1.weight
        layers.0.feed_forward.w1.weight bert.encoder.layer.0.intermediate.dense.weight
        bert.encoder.layer.0.output.dense.weight encoder.layer.0.output_query.dense.weight
        distilbert.transformer.layer.0.ffn.lin1.weight
        albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight
        encoder.block.0.layer.1.DenseReluDense.wi_0.weight encoder.block.0.layer.1.DenseReluDense.wo.weight
        model.encoder.layers.0.fc1.weight model.layers.0.mlp.Wi.weight model.layers.0.mlp.Wo.weight
        gpt_neox.layers.0.mlp.dense_h_to_4h.weight transformer.h.0.mlp.fc_out.weight
        transformer.layer.0.ff.layer_1.weight down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight
        transformer_blocks.0.ff_context.net.2.weight single_transformer_blocks.0.proj_mlp.weight
        convnext.encoder.stages.0.layers.0.pwconv1.weight stages.0.blocks.0.attn_block.mlp.fc1.weight
        blocks.0.mlp_tokens.fc1.weight model.layers.0.mlp.experts.gate_up_proj[3]
        model.layers.0.block_sparse_moe.experts.0.w1.weight model.layers.0.mlp.shared_expert.up_proj.weight
        model.layers.0.feed_forward.experts.down_proj[0] rwkv.blocks.0.feed_forward.key.weight moe.experts[2]
        wav2vec2.encoder.layers.0.feed_forward.output_dense.weight
        blocks.0.mlp_tokens.fc2.weight model.visual.merger.linear_fc1.weight
    """,
    "embedding": """
        wte.weight transformer.wpe.weight model.embed_tokens.weight bert.embeddings.token_type_embeddings.weight
        shared.weight model.shared.weight gpt_neox.embed_in.weight patch_embed.proj.weight pos_embed
        vit.embeddings.patch_embeddings.projection.weight time_text_embed.timestep_embedder.linear_1.weight
        x_embedder.weight context_embedder.weight transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight
        transformer.word_embedding.weight electra.embeddings_project.weight
        resnet.embedder.embedder.convolution.weight backbone.embeddings.weight
        value_embeds.0.weight value_embeds.weight segment_embeds.weight model.token_embeds.weight
        mask_decoder.mask_tokens.weight register_tokens query_tokens embeddings.cls_token perceiver.latents
        semantic.position_embeds_layer.weight pos_encoding.spatial_pos memory_temporal_positional_encoding
    """,
    "head": """
        lm_head.weight output.weight classifier.weight classifier.1.weight classifier.out_proj.weight fc.weight
        head.fc.weight heads.head.weight head_dist.linear.weight cls.predictions.transform.dense.weight
        generator_predictions.dense.weight score.weight qa_outputs.weight proj_out.weight embed_out.weight
        mlp_head.1.weight pre_classifier.weight
        to_logits.weight logits_proj.weight logits.weight model.readout.weight lm_head.decoder.weight lm_out.weight
        vocab_projector.weight to_vocab.weight audio_lm_head.weight unembed.weight out_proj.weight output_proj.weight
        model.out_proj.weight final_linear.weight last_linear.weight
    """,
    "other": """
        0.weight conv1.weight layer1.0.conv1.weight layer2.0.downsample.0.weight bert.pooler.dense.weight
        backbone.layers.0.mixer.in_proj.weight backbone.layers.0.mixer.A_log backbone.layers.0.mixer.out_proj.weight
        model.layers.0.mamba.x_proj.weight model.layers.0.mlp.gate.weight model.layers.0.mlp.router.weight
        model.layers.0.block_sparse_moe.gate.weight model.layers.0.feed_forward.router.weight
        transformer_blocks.0.norm1.linear.weight single_transformer_blocks.0.proj_out.weight norm_out.linear.weight
        down_blocks.0.resnets.0.conv1.weight blocks.0.0.se.conv_reduce.weight visual_projection.weight weight
        stages.0.blocks.0.conv_dw.weight rwkv.member.weight
        model.layers.0.mlp.router.classifier.weight transformer_blocks.0.norm1.linear_1.weight norm_proj.weight
        stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0 layer1.0.se_module.fc1.weight layers.0.out_proj.weight
        face_encoder.out_proj.weight blocks.0.linear_tokens.weight
    """,
}


@pytest.mark.parametrize("expected", NAMES)
def test_the_last_telling_part_of_a_name_decides(expected):
    assert {name: kind(name) for name in NAMES[expected].split()} == dict.fromkeys(NAMES[expected].split(), expected)
