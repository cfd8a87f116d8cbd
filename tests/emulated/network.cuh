// SPDX-License-Identifier: Apache-2.0
// A network between ranks that do not reach each other: matched sends and receives, as NCCL's, over
// puts that complete late and in any order. A warp a peer: what it sends goes through a staging area to
// the peer's, one message at a time, for which the peer gives credit.
#pragma once

#include "device/device.cuh"
#include "kernels/params.hpp"

namespace deepcomm::kernels {

constexpr int32_t kMaxSpans = 5;
constexpr int32_t kMaxNetworkPeers = 8;

struct NetworkSpan {
    unsigned char* begin;
    uint64_t num_bytes;  ///< a multiple of 4
};

struct NetworkPeer {
    int32_t rank;     ///< for the rail's order of puts
    uint32_t number;  ///< of the message, from 1
    int32_t num_sends;
    int32_t num_receives;
    NetworkSpan sends[kMaxSpans];
    NetworkSpan receives[kMaxSpans];
    unsigned char* staging;      ///< here, for what is sent
    unsigned char* inbox_there;  ///< the peer's, for what this rank sends
    unsigned char* inbox;        ///< here, for what the peer sends
    uint64_t* sent_there;        ///< at the peer: messages of this rank
    const uint64_t* sent;        ///< here: messages of the peer
    uint64_t* read_there;        ///< at the peer: its messages that this rank has read
    const uint64_t* read;        ///< here: this rank's messages that the peer has read
};

struct NetworkParams {
    CommParams comm;
    int32_t num_peers;
    NetworkPeer peers[kMaxNetworkPeers];
    const uint64_t* broken;  ///< not 0: what is before on the stream would never have ended
};

DEEPCOMM_DEVICE void copy_bytes(unsigned char* to, const unsigned char* from, uint64_t num_bytes) {
    const device::Warp warp;
    for (uint64_t i = warp.thread_idx(); i < num_bytes / 4; i += device::kWarpSize) {
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
}

DEEPCOMM_DEVICE bool await_count(const NetworkParams& params, const NetworkPeer& peer,
                                 const uint64_t* word, uint64_t expected) {
    // Nobody is told here: whoever waits for what is carried has a deadline too.
    const device::WaitContext context = {nullptr, params.comm.timeout_ns, params.comm.rank};
    const device::WaitSite site = {device::Operation::kProbe, device::Role::kReceive, peer.rank};
    return device::wait_until(context, site, expected, word, [&]() -> device::Observed {
        const uint64_t value = device::ld_acquire_sys(word);
        return {value, value >= expected};
    });
}

DEEPCOMM_DEVICE bool send_message(const NetworkParams& params, const NetworkPeer& peer) {
    const device::Warp warp;
    const bool may_send = await_count(params, peer, peer.read, peer.number - 1);
    if (!warp.sync_and(may_send)) return false;
    uint64_t size = 0;
    for (int32_t i = 0; i < peer.num_sends; ++i) {
        copy_bytes(peer.staging + size, peer.sends[i].begin, peer.sends[i].num_bytes);
        size += peer.sends[i].num_bytes;
    }
    const device::RailPeer to = {peer.rank, peer.rank};
    const auto padded = static_cast<uint32_t>((size + 15) / 16 * 16);
    if (padded != 0) device::rail_put(to, peer.inbox_there, peer.staging, padded);
    device::rail_signal_add(to, peer.sent_there, 1);
    return true;
}

DEEPCOMM_DEVICE bool receive_message(const NetworkParams& params, const NetworkPeer& peer) {
    const device::Warp warp;
    const bool has_come = await_count(params, peer, peer.sent, peer.number);
    if (!warp.sync_and(has_come)) return false;
    uint64_t size = 0;
    for (int32_t i = 0; i < peer.num_receives; ++i) {
        copy_bytes(peer.receives[i].begin, peer.inbox + size, peer.receives[i].num_bytes);
        size += peer.receives[i].num_bytes;
    }
    warp.sync();  // ORDER: the reads of all lanes before the credit
    // ORDER: pairs with the sender's wait for it
    if (warp.is_leader()) device::st_release_sys(peer.read_there, uint64_t{peer.number});
    return true;
}

extern "C" __global__ void __launch_bounds__(kMaxNetworkPeers * 32)
    network_move(const __grid_constant__ NetworkParams params) {
    const int32_t w = device::Warp{}.warp_idx();
    if (w >= params.num_peers || device::ld_relaxed_sys(params.broken) != 0) return;
    const NetworkPeer& peer = params.peers[w];
    if (!send_message(params, peer) || !receive_message(params, peer)) return;
    device::rail_flush(peer.rank);
}

}  // namespace deepcomm::kernels
