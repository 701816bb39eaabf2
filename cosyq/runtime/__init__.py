"""Speaking from an artifact: sampling, the decode loop, the streaming schedule, engines, the synthesizer."""
