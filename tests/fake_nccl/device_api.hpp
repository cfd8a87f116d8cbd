// SPDX-License-Identifier: Apache-2.0
// Windows, properties and device communicators of the NCCL without a GPU: a part of nccl.cpp.
#pragma once

namespace {

/// As this library has them; a test says so to who asks.
struct Properties {
    uint64_t size;
    int num_ranks, num_lsa_teams, gin_type, railed_gin_type;
    bool has_device_api;
};

constexpr size_t kDevCommBytes = 24, kRequirementsBytes = 32;

std::array<unsigned char, kRequirementsBytes> last_requirements{};

}  // namespace

extern "C" {

Result ncclCommWindowRegister(Comm comm, void* address, size_t num_bytes, Window* window,
                              int flags) {
    BEGIN("ncclCommWindowRegister")
    if (flags != kSymmetricWindow) return fail(kInvalidArgument, "not the flags expected");
    return start(comm, "ncclCommWindowRegister", [=](Comm comm) {
        if (wish("no windows") != 0) return kSuccess;
        comm->windows.push_back(std::make_unique<WindowObject>(WindowObject{address, num_bytes}));
        *window = comm->windows.back().get();
        return kSuccess;
    });
}
Result ncclCommWindowDeregister(Comm comm, Window window) {
    BEGIN("ncclCommWindowDeregister")
    for (auto entry = comm->windows.begin(); entry != comm->windows.end(); ++entry) {
        if (entry->get() == window) {
            comm->windows.erase(entry);
            return kSuccess;
        }
    }
    return fail(kInvalidArgument, "no such window");
}
Result ncclCommQueryProperties(Comm comm, void* properties) {
    BEGIN("ncclCommQueryProperties")
    auto* const filled = static_cast<Properties*>(properties);
    if (filled->size != sizeof(Properties)) return fail(kInvalidArgument, "of another size");
    filled->num_ranks = comm->num_ranks;
    filled->num_lsa_teams = wish("lsa teams", comm->num_ranks);
    filled->gin_type = wish("gin type");
    filled->railed_gin_type = wish("railed gin type");
    filled->has_device_api = wish("no device api") == 0;
    return kSuccess;
}
Result ncclDevCommCreate(Comm comm, const void* requirements, void* dev_comm) {
    BEGIN("ncclDevCommCreate")
    std::memcpy(last_requirements.data(), requirements, last_requirements.size());
    return start(comm, "ncclDevCommCreate", [=](Comm comm) {
        std::memset(dev_comm, 0xDC, kDevCommBytes);
        comm->has_dev_comm = true;
        return kSuccess;
    });
}
Result ncclDevCommDestroy(Comm comm, const void* dev_comm) {
    BEGIN("ncclDevCommDestroy")
    if (*static_cast<const unsigned char*>(dev_comm) != 0xDC) {
        return fail(kInvalidArgument, "not what was made");
    }
    comm->has_dev_comm = false;
    return kSuccess;
}

void fake_nccl_requirements(unsigned char* bytes) {
    std::memcpy(bytes, last_requirements.data(), last_requirements.size());
}
}
