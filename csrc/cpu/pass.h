// How a kernel's pass over its data gets its threads and its scratch.
#pragma once
#include "cpu/arena.h"
#include "cpu/team.h"
#include "cpu/threads.h"

namespace fastseq::FASTSEQ_ISA {

// Member `member` of `members` gets [share(..), share(.. + 1)) of `count` things.
inline int64_t share(int64_t count, int64_t member, int64_t members) { return count * member / members; }

// Calls body(rank, team) on every member of a team of about `size` threads.
template <typename Body>
void in_team(const Threads& threads, int size, const Body& body) {
  struct Context {
    Team team;
    const Body& body;
  } context{{}, body};
  threads.run(
      size,
      [](void* opaque, int calls) {
        auto& context = *static_cast<Context*>(opaque);
        const int rank = context.team.join(calls);
        if (rank >= 0) context.body(rank, context.team);
      },
      &context);
}

// Lays out the pass's scratch in the arena and runs it on a team.
template <typename Pass, typename T>
void run_pass(Pass& pass, const Threads& threads) {
  const int size = pass.team_size(threads);
  Arena<T> arena(pass.lay_out(nullptr, size));
  pass.lay_out(arena.data(), size);
  in_team(threads, size, [&](int rank, Team& team) { pass.run(rank, team); });
}

}  // namespace fastseq::FASTSEQ_ISA
