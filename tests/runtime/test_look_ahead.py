import torch
from conftest import relative

from cosyq.model.config import FlowConfig
from cosyq.model.flow import TokenEncoder
from cosyq.runtime.look_ahead import look_ahead


def test_products_are_the_convolutions():
    torch.manual_seed(5)
    config = FlowConfig(
        vocab=40, token_dim=8, mel_dim=12, speaker_dim=6, token_mel_ratio=2, lookahead=3, lookahead_channels=16,
        dim=64, depth=2, heads=2, head_dim=32, ff_dim=128, conv_kernel=4, conv_groups=4, chunk_frames=10,
        guidance=0.7, noise_frames=60,
    )  # fmt: skip
    encoder, x = TokenEncoder(config).requires_grad_(False), torch.randn(9, 8)
    for count in (1, 2, 9):
        expected = encoder(x[None, :count], True)[0]
        assert relative(look_ahead(encoder, x[:count], torch.ones(count, 1, dtype=torch.bool)), expected) < 1e-6
    assert (
        relative(look_ahead(encoder.bfloat16(), x, torch.ones(9, 1, dtype=torch.bool)), encoder(x[None], True)[0])
        < 0.01
    )
