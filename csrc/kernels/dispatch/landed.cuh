// SPDX-License-Identifier: Apache-2.0
// With several nodes and a network between them: rows that are sent on while others are still on their
// way. Which ones are here, and the order in which they come. PROTOCOLS.md: dispatch_send, carried rails.
#pragma once

#include "kernels/dispatch/send_shared.cuh"

namespace deepcomm::kernels {

/// Pieces are tokens, or chunks of kChunk; those of an origin are the ones that begin in it. One warp.
template <typename Spec, int32_t kChunk>
struct PieceOrder {
    const SendBlock<Spec>& my;

    /// The n-th piece in the order in which rows come: this node's own are here; then, part by part,
    /// those of every other origin. All lanes.
    DEEPCOMM_DEVICE int32_t at(int32_t n) const {
        // A piece that is not whole is the last one: its warp ends with it.
        if (n >= num_whole()) return n;
        const int32_t own = my.params.rail.comm.rank, first = first_of(own);
        const int32_t num_own = first_of(own + 1) - first;
        if (n < num_own) return first + n;
        n -= num_own;
        const device::Warp warp;
        int32_t num_parts = 0;  // of each origin, that come before
        for (int32_t num_passed = warp.size(); num_passed == warp.size(); num_parts += num_passed) {
            const int32_t before = num_before(num_parts + warp.thread_idx() + 1);
            num_passed = device::popcount(device::warp_ballot(before <= n));
        }
        return find(num_parts, n - num_before(num_parts));
    }

  private:
    DEEPCOMM_DEVICE int32_t num_whole() const { return my.num_tokens / kChunk; }
    DEEPCOMM_DEVICE int32_t part() const { return my.params.rail.part_rows / kChunk; }
    DEEPCOMM_DEVICE int32_t first_of(int32_t origin) const {
        const int32_t piece = (my.first_token(origin) + kChunk - 1) / kChunk;
        return piece < num_whole() ? piece : num_whole();
    }
    /// Those of an origin that are in its parts from num_parts on.
    DEEPCOMM_DEVICE int32_t num_left(int32_t origin, int32_t num_parts) const {
        if (origin == my.params.rail.comm.rank) return 0;
        const int32_t left = first_of(origin + 1) - first_of(origin) - num_parts * part();
        return left > 0 ? left : 0;
    }
    /// Pieces in the first parts of all other origins.
    DEEPCOMM_DEVICE int32_t num_before(int32_t num_parts) const {
        int32_t num = 0;
        DEEPCOMM_NO_UNROLL
        for (int32_t origin = 0; origin < my.params.num_origins; ++origin) {
            num += num_left(origin, 0) - num_left(origin, num_parts);
        }
        return num;
    }
    /// The n-th piece of the origins' parts of one number.
    DEEPCOMM_DEVICE int32_t find(int32_t num_parts, int32_t n) const {
        int32_t origin = 0;
        for (;; ++origin) {
            const int32_t left = num_left(origin, num_parts);
            const int32_t num_here = left < part() ? left : part();
            if (n < num_here) break;
            n -= num_here;
        }
        return first_of(origin) + num_parts * part() + n;
    }
};

/// Which rows are here, as far as a warp knows.
template <typename Spec>
struct LandedRows {
    const SendBlock<Spec>& my;
    int32_t begin = 0;  ///< the tokens of one origin that are here
    int32_t end = 0;
    bool has_failed = false;

    DEEPCOMM_DEVICE explicit LandedRows(const SendBlock<Spec>& block) : my(block) {}

    /// Whether the row of a token is here, also if it has to be waited for. All lanes.
    DEEPCOMM_DEVICE bool have(int32_t token, bool may_wait) {
        if (begin <= token && token < end) return true;
        int32_t origin = 0;
        while (token >= my.first_token(origin + 1)) ++origin;
        begin = my.first_token(origin);
        end = my.first_token(origin + 1);
        if (origin == my.params.rail.comm.rank) return true;
        const device::Warp warp;
        int32_t num_rows = 0;
        if (warp.is_leader()) num_rows = look(origin, token - begin, may_wait);
        num_rows = device::warp_shuffle(num_rows, 0);
        has_failed = num_rows < 0;
        if (num_rows < end - begin) end = begin + num_rows;  // a part may end beyond the last row
        return token < end;
    }

  private:
    /// By the leader, who loads rows: how many of an origin are here; -1 if the wait has run out.
    DEEPCOMM_DEVICE int32_t look(int32_t origin, int32_t row, bool may_wait) const {
        const RailSide& rail = my.params.rail;
        const device::WaitSite site = {device::Operation::kDispatch, device::Role::kForward, origin,
                                       row};
        const uint64_t* word = rail.landed + origin;
        int32_t num_rows = 0;
        const auto poll = [&]() -> device::Observed {
            const uint64_t value = device::ld_relaxed_gpu(word);
            num_rows = value >> 32 == my.epoch ? static_cast<int32_t>(value) : 0;
            return {value, num_rows > row};
        };
        const bool is_here =
            may_wait ? device::wait_until(wait_context(rail.comm), site, row + 1, word, poll)
                     : poll().is_ready;
        device::fence_acq_rel_gpu();  // ORDER: acquires the rows; pairs with rail_deliver's fence
        device::fence_proxy_async();  // ORDER: rows that a network has stored, then bulk loads
        return is_here || !may_wait ? num_rows : -1;
    }
};

}  // namespace deepcomm::kernels
