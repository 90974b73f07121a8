// Runs one key kernel once, with one thread, by its AVX2 build. instructions.py builds this with that build and counts
// the instructions inside of `measured`.
//
//   instructions                 prints the names of the cases
//   instructions lstm-training   runs one

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/recurrent.h"

namespace fastseq::avx2 {
extern const RecurrentKernels lstm_kernels, gru_kernels;
extern const AttentionKernels attention_kernels;
}  // namespace fastseq::avx2

using namespace fastseq;
using Numbers = std::vector<float>;

// callgrind finds it by its name.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& call) { call(); }

const Threads kOneThread{1, [](int, void (*body)(void*, int), void* context) { body(context, 1); }};

// Uniform within +-bound. The standard's own distributions differ from library to library, its generators do not.
Numbers random(size_t count, float bound) {
  static std::mt19937 bits(1);
  Numbers numbers(count);
  for (float& x : numbers) x = bound * (float(bits()) / 2147483648.0f - 1.0f);
  return numbers;
}

// Whether a kernel has filled its results: every number is finite and hardly any is zero.
bool are_filled(std::initializer_list<const Numbers*> results) {
  for (const Numbers* numbers : results) {
    size_t zeros = 0;
    for (const float x : *numbers) {
      if (!std::isfinite(x)) return false;
      zeros += x == 0;
    }
    if (zeros > numbers->size() / 100) return false;
  }
  return true;
}

// A layer of H units on random input [T, B, H], with torch's layout and initialisation.
class Recurrent {
 public:
  Recurrent(int64_t gates, int64_t T, int64_t B, int64_t H)
      : gates_(gates),
        T_(T),
        B_(B),
        H_(H),
        x_(random(T * B * H, 1.7f)),
        w_ih_(random(gates * H * H, 1 / std::sqrt(float(H)))),
        w_hh_(random(gates * H * H, 1 / std::sqrt(float(H)))),
        b_ih_(random(gates * H, 1 / std::sqrt(float(H)))),
        b_hh_(random(gates * H, 1 / std::sqrt(float(H)))),
        y_(T * B * H),
        h_n_(B * H),
        c_n_(B * H) {}

  bool infer(const RecurrentKernels& kernels) {
    RecurrentForward<float> forward = call<RecurrentForward<float>>();
    forward.y = y_.data(), forward.h_n = h_n_.data();
    measured([&] { kernels.forward_float(forward, kOneThread); });
    return are_filled({&y_, &h_n_});
  }

  // For cells with a tape of all gates and of c.
  bool train(const RecurrentKernels& kernels) {
    const Numbers dy = random(T_ * B_ * H_, 1);
    Numbers tape(T_ * B_ * gates_ * H_), cells(T_ * B_ * H_), dx(x_.size());
    Numbers dw_ih(w_ih_.size()), dw_hh(w_hh_.size()), db_ih(b_ih_.size()), db_hh(b_hh_.size());
    RecurrentForward<float> forward = call<RecurrentForward<float>>();
    forward.y = y_.data(), forward.h_n = h_n_.data(), forward.c_n = c_n_.data();
    forward.gates = tape.data(), forward.cells = cells.data();
    RecurrentBackward<float> backward = call<RecurrentBackward<float>>();
    backward.dy = dy.data(), backward.dy_t = B_ * H_, backward.dy_b = H_;
    backward.y = y_.data(), backward.gates = tape.data(), backward.cells = cells.data();
    backward.dx = dx.data();
    backward.dweights[0] = {dw_ih.data(), dw_hh.data(), db_ih.data(), db_hh.data(), nullptr};
    measured([&] {
      kernels.forward_float(forward, kOneThread);
      kernels.backward_float(backward, kOneThread);
    });
    return are_filled({&y_, &h_n_, &c_n_, &dx, &dw_ih, &dw_hh, &db_ih, &db_hh});
  }

 private:
  template <typename Call>
  Call call() const {
    Call call{};
    call.T_ = T_, call.B = B_, call.I = H_, call.H = H_, call.P = H_, call.D = 1, call.N = T_ * B_;
    call.x = x_.data(), call.x_t = B_ * H_, call.x_b = H_;
    call.weights[0] = {w_ih_.data(), w_hh_.data(), b_ih_.data(), b_hh_.data(), nullptr};
    return call;
  }

  int64_t gates_, T_, B_, H_;
  Numbers x_, w_ih_, w_hh_, b_ih_, b_hh_, y_, h_n_, c_n_;
};

// Causal self-attention on random [1, H, S, D].
bool train_attention(int64_t H, int64_t S, int64_t D) {
  const size_t count = H * S * D;
  Numbers q = random(count, 1.7f), k = random(count, 1.7f), v = random(count, 1.7f), dout = random(count, 1.7f);
  Numbers out(count), lse(H * S), dq(count), dk(count), dv(count);
  const auto heads = [&](Numbers& numbers) { return Heads{numbers.data(), H * S * D, S * D, D}; };
  const auto call = [&](auto call) {
    call.N = 1, call.H = H, call.Hk = H, call.L = S, call.S = S, call.E = D, call.Ev = D;
    call.q = heads(q), call.k = heads(k), call.v = heads(v);
    call.sequences = 1;
    call.scale = 1 / std::sqrt(float(D));
    call.left = -1, call.right = 0;
    return call;
  };
  auto forward = call(AttentionForward<float>{});
  forward.out = heads(out), forward.lse = lse.data();
  auto backward = call(AttentionBackward<float>{});
  backward.dout = heads(dout), backward.out = heads(out), backward.lse = lse.data();
  backward.dq = heads(dq), backward.dk = heads(dk), backward.dv = heads(dv);
  measured([&] {
    avx2::attention_kernels.forward_float(forward, kOneThread);
    avx2::attention_kernels.backward_float(backward, kOneThread);
  });
  return are_filled({&out, &lse, &dq, &dk, &dv});
}

int main(int argc, char** argv) {
  // instructions.py has the same to race torch.
  const std::pair<const char*, std::function<bool()>> cases[] = {
      {"lstm-training", [] { return Recurrent(4, 32, 8, 128).train(avx2::lstm_kernels); }},
      {"gru-inference", [] { return Recurrent(3, 100, 1, 128).infer(avx2::gru_kernels); }},
      {"attention-training", [] { return train_attention(4, 256, 64); }},
  };
  if (argc == 1) {
    for (const auto& [name, run] : cases) std::puts(name);
    return 0;
  }
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fputs("this machine does not have AVX2\n", stderr);
    return 2;
  }
  for (const auto& [name, run] : cases) {
    if (std::strcmp(name, argv[1])) continue;
    if (run()) return 0;
    std::fprintf(stderr, "%s: results were left empty or are not finite\n", name);
    return 1;
  }
  std::fprintf(stderr, "there is no case %s\n", argv[1]);
  return 1;
}
