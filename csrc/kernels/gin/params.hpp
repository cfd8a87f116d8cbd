// SPDX-License-Identifier: Apache-2.0
// Arguments of the rail agent. PROTOCOLS.md: moves over GIN.
#pragma once

#include "kernels/params.hpp"
#include "layout/gin.hpp"

namespace deepcomm::kernels {

struct GinParams {
    CommParams comm;  ///< bases: null; failed: of who moves, set where a move has not come about
    const void* dev_comm;        ///< ncclDevComm, in device memory
    const void* const* windows;  ///< [kMostGinWindows] ncclWindow_t, in memory shared with the host
    unsigned char* control;      ///< this rank's layout::GinControl, at the begin of window 0
    const layout::GinPeer* peers;  ///< [num_peers] in memory shared with the host
    int32_t num_peers;
    uint64_t number;  ///< of the move
    uint64_t* done;   ///< in memory shared with the host: set to number at the end
};

}  // namespace deepcomm::kernels
