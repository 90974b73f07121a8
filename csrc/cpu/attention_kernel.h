// Scaled dot product attention on the CPU: which pass runs a call.
#pragma once
#include "cpu/attention_backward.h"
#include "cpu/attention_decode.h"

namespace fastseq::FASTSEQ_ISA {

template <typename Pass, typename T, typename Call>
void run_attention(const Call& call, const Threads& threads) {
  Pass pass(call, threads.count);
  run_pass<Pass, T>(pass, threads);
}

template <typename T>
void attention_forward(const AttentionForward<T>& call, Threads threads) {
  if (AttentionDecodePass<T>::serves(AttentionRows<T>(call)))
    run_attention<AttentionDecodePass<T>, T>(call, threads);
  else
    run_attention<AttentionForwardPass<T>, T>(call, threads);
}

template <typename T>
void attention_backward(const AttentionBackward<T>& call, Threads threads) {
  run_attention<AttentionBackwardPass<T>, T>(call, threads);
}

}  // namespace fastseq::FASTSEQ_ISA
