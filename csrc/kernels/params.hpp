// SPDX-License-Identifier: Apache-2.0
// What every kernel of an operation gets: who it is, where its peers' memory is, how it fails.
#pragma once

#include "common/int.hpp"
#include "layout/error_record.hpp"

namespace deepcomm::kernels {

struct CommParams {
    int32_t rank;
    int32_t num_ranks;
    layout::RankNames names;
    uint64_t timeout_ns;          ///< of each wait
    layout::ErrorRecord* record;  ///< of this rank, in memory shared with the host
    unsigned char* const* bases;  ///< [num_ranks] in device memory: each rank's symmetric memory
    uint64_t* failed;             ///< in device memory: not 0 once a wait of this rank has failed
};

}  // namespace deepcomm::kernels
