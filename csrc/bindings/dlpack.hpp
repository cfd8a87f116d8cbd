// SPDX-License-Identifier: Apache-2.0
// Leased bytes of symmetric memory as a DLPack capsule: the storage's deleter ends the lease. The
// structures are DLPack's public C ABI, version 0.8 (dlpack.h), as far as bytes on CPUs need it.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>

#include "cpu/endpoint.hpp"

namespace deepcomm {

struct DlDevice {
    int32_t device_type;
    int32_t device_id;
};

struct DlDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct DlManagedTensor {
    DlTensor tensor;
    void* manager_ctx;
    void (*deleter)(DlManagedTensor*);
};

/// One lease and the tensor that stands for it.
struct LeasedBytes {
    DlManagedTensor managed{};
    int64_t shape = 0;
    std::shared_ptr<cpu::Leases> leases;
    int32_t generation = 0;

    static void end(DlManagedTensor* managed) {
        auto* const self = static_cast<LeasedBytes*>(managed->manager_ctx);
        // ORDER: pairs with the acquire in Endpoint::choose_landing: the reader is done first.
        self->leases->count[static_cast<size_t>(self->generation)].fetch_sub(
            1, std::memory_order_release);
        delete self;
    }
};

inline pybind11::capsule lease_capsule(const std::shared_ptr<cpu::Leases>& leases,
                                       int32_t generation, int64_t offset, int64_t num_bytes) {
    constexpr int32_t kCpu = 1;
    constexpr uint8_t kUint = 1;
    auto* const leased = new LeasedBytes;
    leased->leases = leases;
    leased->generation = generation;
    leased->shape = num_bytes;
    leased->managed.tensor.data = leases->segment->data() + offset;
    leased->managed.tensor.device = {kCpu, 0};
    leased->managed.tensor.ndim = 1;
    leased->managed.tensor.dtype = {kUint, 8, 1};
    leased->managed.tensor.shape = &leased->shape;
    leased->managed.manager_ctx = leased;
    leased->managed.deleter = &LeasedBytes::end;
    leases->count[static_cast<size_t>(generation)].fetch_add(1, std::memory_order_relaxed);
    return pybind11::capsule(&leased->managed, "dltensor", [](PyObject* object) {
        // A consumer renames the capsule and owns the tensor from then on.
        if (PyCapsule_IsValid(object, "dltensor") != 0) {
            auto* const managed =
                static_cast<DlManagedTensor*>(PyCapsule_GetPointer(object, "dltensor"));
            managed->deleter(managed);
        }
    });
}

}  // namespace deepcomm
