// SPDX-License-Identifier: Apache-2.0
// The rail agent between a few ranks, over the emulated device API of gin/nccl_device.h.
#include "gin/stage.hpp"

namespace deepcomm::testing {

namespace {

// ---- what comes about

std::string exchange_case(Cluster& cluster) {
    Stage stage(cluster, 3);
    for (int move = 0; move < 4; ++move) stage.launch(mixed_plan(3, move));
    const std::string error = cluster.run();
    return error.empty() ? stage.check() : error;
}

/// First one way alone, then the other, then both; nothing is between ranks 1 and 2 at all.
std::string ways_case(Cluster& cluster) {
    Stage stage(cluster, 3);
    Plan both = single_plan(0, 1, 32, 2);
    both.pieces[1][0] = single_plan(1, 0, 16).pieces[1][0];
    for (const Plan& plan : {single_plan(0, 1, 64), single_plan(1, 0, 8), both, both, Plan{},
                             single_plan(2, 0, 4), single_plan(0, 1, 64)}) {
        stage.launch(plan);
    }
    const std::string error = cluster.run();
    return error.empty() ? stage.check() : error;
}

/// As many spans as fit, and long ones.
std::string spans_case(Cluster& cluster) {
    Stage stage(cluster, 2);
    Plan plan = single_plan(0, 1, 16, layout::kMostGinSpans);
    plan.pieces[1][0] = single_plan(1, 0, 600, 2).pieces[1][0];
    for (int move = 0; move < 2; ++move) stage.launch(plan);
    const std::string error = cluster.run();
    return error.empty() ? stage.check() : error;
}

/// The example of PROTOCOLS.md, whose numbers test_gin.py reads there.
std::string example_case(Cluster& cluster) {
    Stage stage(cluster, 2);
    Plan before = single_plan(0, 1, 64, 2);
    before.pieces[1][0] = single_plan(1, 0, 32, 2).pieces[1][0];
    Plan third = single_plan(1, 0, 96);
    Places places;
    places.add(third, 0, 1, 14336);
    places.add(third, 0, 1, 64);
    for (const Plan& plan : {before, before, third}) stage.launch(plan);
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    note(format("counters %d %d", static_cast<int>(stage.side(0).dev_comm->counters[1]),
                static_cast<int>(stage.side(1).dev_comm->counters[0]))
             .c_str());
    DEEPCOMM_EXPECT("READY", 0, 3u, stage.signal(0, 2));
    DEEPCOMM_EXPECT("DATA", 0, 3u, stage.signal(0, 3));
    return stage.check();
}

// ---- what does not

/// Rank 0 sends what rank 1 does not expect: it says so and sends nothing, now and later.
std::string expect_refusal(Cluster& cluster, const Plan& sent, const Plan& expected, int slot,
                           std::pair<uint64_t, uint64_t> values) {
    Stage stage(cluster, 2);
    for (int move = 0; move < 2; ++move) {
        stage.launch_agent(0, sent, sent);
        stage.launch_agent(1, expected, expected);
    }
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    const ErrorRecord& record = *stage.side(0).record;
    DEEPCOMM_EXPECT("kind", 0, static_cast<uint64_t>(FailureKind::kCheck),
                    static_cast<uint64_t>(record.kind));
    DEEPCOMM_EXPECT("peer", 0, 1u, static_cast<uint64_t>(record.peer));
    DEEPCOMM_EXPECT("slot", 0, static_cast<uint64_t>(slot), static_cast<uint64_t>(record.slot));
    DEEPCOMM_EXPECT("expected", 0, values.first, record.expected);
    DEEPCOMM_EXPECT("observed", 0, values.second, record.observed);
    DEEPCOMM_EXPECT("data signal", 0, 0u, stage.signal(1, 1));
    DEEPCOMM_EXPECT("done", 0, 2u, *stage.side(0).done);
    const ErrorRecord& waiting = *stage.side(1).record;
    DEEPCOMM_EXPECT("kind", 1, static_cast<uint64_t>(FailureKind::kTimeout),
                    static_cast<uint64_t>(waiting.kind));
    DEEPCOMM_EXPECT("peer", 1, 0u, static_cast<uint64_t>(waiting.peer));
    DEEPCOMM_EXPECT("done", 1, 2u, *stage.side(1).done);
    return "";
}

std::string other_size_case(Cluster& cluster) {
    Plan expected = single_plan(0, 1, 64, 2);
    expected.pieces[0][1][1].to.num_bytes = 60;
    return expect_refusal(cluster, single_plan(0, 1, 64, 2), expected, 1, {64, 60});
}

std::string other_spans_case(Cluster& cluster) {
    return expect_refusal(cluster, single_plan(0, 1, 16, 3), single_plan(0, 1, 16, 2),
                          kernels::kGinNumSpans, {3, 2});
}

/// Rank 0 has left out a move: what comes is of another one than it thinks.
std::string other_number_case(Cluster& cluster) {
    Stage stage(cluster, 2);
    const Plan plan = single_plan(0, 1, 16);
    stage.side(1).num_receives[0] = 1;  // and does not know of it
    stage.launch_agent(0, plan, plan);
    stage.launch_agent(1, plan, plan);
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    const ErrorRecord& record = *stage.side(0).record;
    DEEPCOMM_EXPECT("slot", 0, static_cast<uint64_t>(kernels::kGinNumber),
                    static_cast<uint64_t>(record.slot));
    DEEPCOMM_EXPECT("expected", 0, 1u, record.expected);
    DEEPCOMM_EXPECT("observed", 0, 2u, record.observed);
    DEEPCOMM_EXPECT("data signal", 0, 0u, stage.signal(1, 1));
    return "";
}

/// Rank 1 does not come; rank 2 plays the host of rank 0, which lets the agent go.
std::string abort_case(Cluster& cluster) {
    Stage stage(cluster, 2);
    const Plan plan = single_plan(1, 0, 16);
    stage.launch_agent(0, plan, plan);
    stage.launch_agent(0, plan, plan);
    ErrorRecord* record = stage.side(0).record;
    stage.side(0).dev_comm->awaited = &record->state;
    cluster.launch(2, {1, 1, 0, [=] {
                           device::sleep_ns(20'000);
                           device::st_release_sys(&record->state,
                                                  static_cast<uint32_t>(RecordState::kComplete));
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    DEEPCOMM_EXPECT("done", 0, 2u, *stage.side(0).done);
    DEEPCOMM_EXPECT("peer", 0, 0u, static_cast<uint64_t>(record->peer));  // as it was
    const uint64_t num_told = stage.signal(1, 0);
    if (num_told > 1) return "the move after the abort has told its peer";
    if (cluster.statistics().now_ns > settings().timeout_ns / 2) return "the agent stayed";
    note(num_told == 1 ? "it had told its peer" : "it had not told its peer");
    return "";
}

/// Rank 3 plays the host of rank 0, which writes the next move's entries where this one's are.
std::string reuse_case(Cluster& cluster) {
    Stage stage(cluster, 3);
    const Plan plan = mixed_plan(3, 1);
    stage.launch(plan);
    const Side own = stage.side(0);
    const device::WaitContext context = {nullptr, settings().timeout_ns, 3};
    const device::WaitSite site = {layout::Operation::kProbe, layout::Role::kReceive};
    cluster.launch(3, {1, 1, 0, [=] {
                           const bool is_done = device::wait_until(
                               context, site, 1, own.done, [=]() -> device::Observed {
                                   const uint64_t value = device::ld_acquire_sys(own.done);
                                   return {value, value == 1};
                               });
                           if (!is_done) return;
                           for (int i = 0; i < 2; ++i) own.peers[i].rank = 7;
                       }});
    const std::string error = cluster.run();
    if (!error.empty()) return error;
    for (int i = 0; i < 2; ++i) {
        DEEPCOMM_EXPECT("peers", i, 7u, static_cast<uint64_t>(own.peers[i].rank));
    }
    return stage.check();
}

const Register kExchange("exchange", 3, exchange_case);
const Register kWays("ways", 3, ways_case);
const Register kSpans("spans", 2, spans_case);
const Register kExample("example", 2, example_case);
const Register kReuse("reuse", 4, reuse_case);
const Register kOtherSize("other_size", 2, other_size_case);
const Register kOtherSpans("other_spans", 2, other_spans_case);
const Register kOtherNumber("other_number", 2, other_number_case);
const Register kAbort("abort", 3, abort_case);

}  // namespace

}  // namespace deepcomm::testing
