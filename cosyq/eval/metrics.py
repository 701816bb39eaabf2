"""All metrics there are, in the order of a report.

The first ones are without chance: both sides are given the reference's own speech ids, noise and mel, so that an
artifact against itself gives exact zeros. The spoken ones draw ids, the same uniform numbers on both sides.
"""

from __future__ import annotations

from cosyq.eval.metric import Metric

KL = Metric("llm.kl", "divergence of the next id's distribution, a step", "nats", "lower", 0.01)
TOP1 = Metric("llm.top1", "steps whose likeliest id is the reference's", "%", "higher", 1.0)
NLL = Metric("llm.nll", "negative log-likelihood of the reference's ids, a step", "nats", "lower", 0.02)
STOP = Metric("llm.stop", "probability of stopping at the true end", "%", "near", 1.0)
FLOW_LSD = Metric("flow.lsd", "log-spectral distance of the mel", "dB", "lower", 0.1)
FLOW_MCD = Metric("flow.mcd", "mel-cepstral distance of the mel", "dB", "lower", 0.1)
VOCODER_STFT = Metric("vocoder.stft", "multi-resolution STFT distance, of the same mel", "", "lower", 0.02)
CHAIN_LSD = Metric("chain.lsd", "log-spectral distance of the sound's mel, of the same ids", "dB", "lower", 0.1)
CHAIN_STFT = Metric("chain.stft", "multi-resolution STFT distance, of the same ids", "", "lower", 0.02)
EXACT = (KL, TOP1, NLL, STOP, FLOW_LSD, FLOW_MCD, VOCODER_STFT, CHAIN_LSD, CHAIN_STFT)

ERRORS = Metric("spoken.errors", "words (Chinese: characters) that a recognizer gets wrong", "%", "lower", 1.0)
SIMILARITY = Metric("spoken.similarity", "cosine of the speaker vector with the voice's own", "", "higher", 0.01)
TIMBRE = Metric("spoken.timbre", "one less the cosine of both sides' speaker vectors", "", "lower", 0.01)
MOS = Metric("spoken.mos", "predicted mean opinion score", "", "higher", 0.1)
DURATION = Metric("spoken.duration", "seconds an utterance", "s", "near", 0.05)
RUNAWAY = Metric("spoken.runaway", "utterances that ran to their bound", "%", "lower", 1.0)
TRUNCATED = Metric("spoken.truncated", "utterances that end before their last words", "%", "lower", 1.0)
CLICKS = Metric("spoken.clicks", "clicks a minute", "", "lower", 1.0)
SILENCE = Metric("spoken.silence", "of the time without sound, between the first and the last of it", "%", "near", 2.0)
SPOKEN = (ERRORS, SIMILARITY, TIMBRE, MOS, DURATION, RUNAWAY, TRUNCATED, CLICKS, SILENCE)

METRICS = {metric.key: metric for metric in (*EXACT, *SPOKEN)}
