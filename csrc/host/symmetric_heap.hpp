// SPDX-License-Identifier: Apache-2.0
// One rank's symmetric memory: its own block and the mappings of its peers', kept until it is closed
// and all leases of the own block have ended.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "host/physical_memory.hpp"

namespace deepcomm::host {

class SymmetricHeap {
  public:
    /// Frees what was put off; allocates and zeroes the own block, of num_bytes rounded up, maps it.
    SymmetricHeap(std::shared_ptr<Device> device, int64_t num_bytes);

    /// The own block, for ranks of other processes and of this one; null once closed.
    const std::shared_ptr<PhysicalMemory>& memory() const { return memory_; }
    std::shared_ptr<Mapping> mapping() const;
    int64_t num_bytes() const { return num_bytes_; }
    /// Address of the own block; 0 once closed.
    cu::DevicePtr base() const;
    /// Maps the block of a peer in another process and returns its address.
    cu::DevicePtr map(std::shared_ptr<PhysicalMemory> peer);
    /// Takes part in the mapping of a peer in this process and returns its address.
    cu::DevicePtr join(std::shared_ptr<Mapping> peer);

    /// Keeps the mappings until end_lease; the address of the own block at offset.
    class Lease;
    std::shared_ptr<Lease> lease(int64_t generation, int64_t offset, int64_t num_bytes);
    int64_t num_leases(int64_t generation) const;

    /// Lets go of everything that no lease needs. The streams, of work that may still use leased
    /// memory, are waited for before it goes. Idempotent.
    void close(std::vector<cu::Stream> streams);

    const Device& device() const { return *device_; }

  private:
    cu::DevicePtr add(std::shared_ptr<Mapping> peer);

    /// What leases share: unmapped when the last one and the heap are gone.
    struct Mappings;
    struct LeaseCounts {
        mutable std::mutex mutex;
        std::map<int64_t, int64_t> by_generation;
    };

    std::shared_ptr<Device> device_;
    std::shared_ptr<PhysicalMemory> memory_;
    int64_t num_bytes_;
    std::shared_ptr<Mappings> mappings_;
    std::shared_ptr<LeaseCounts> counts_;
};

/// Bytes of the own block that somebody still reads. Ends with the object, in any thread; after the
/// heap, the memory itself is freed when symmetric memory is reserved next (host/put_off.hpp).
class SymmetricHeap::Lease {
  public:
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    cu::DevicePtr address() const { return address_; }

  private:
    friend class SymmetricHeap;
    Lease(std::shared_ptr<Mappings> mappings, std::shared_ptr<LeaseCounts> counts,
          int64_t generation, cu::DevicePtr address);

    std::shared_ptr<Mappings> mappings_;
    std::shared_ptr<LeaseCounts> counts_;
    int64_t generation_;
    cu::DevicePtr address_;
};

}  // namespace deepcomm::host
