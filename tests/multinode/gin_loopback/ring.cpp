// SPDX-License-Identifier: Apache-2.0
#include "ring.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "log.hpp"

namespace loopback {

namespace {

constexpr uint64_t kMagic = 0x6465657063676e31;
constexpr long kUsualRingBytes = 1 << 20;
constexpr auto kPoll = std::chrono::milliseconds(1);

[[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error(what + ": " + std::strerror(errno));
}

/// A power of two, at least eight pages, so that an entry and a page-aligned ring always fit.
uint64_t ring_bytes() {
    const auto wanted =
        static_cast<uint64_t>(setting("DEEPCOMM_LOOPBACK_RING_BYTES", kUsualRingBytes));
    uint64_t capacity = 8 * kPageBytes;
    while (capacity < wanted) {
        capacity *= 2;
    }
    return capacity;
}

struct flock whole_file(short type) {
    struct flock lock{};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    return lock;
}

}  // namespace

Clock::duration timeout() {
    static const long seconds = setting("DEEPCOMM_LOOPBACK_TIMEOUT_S", 60);
    return std::chrono::seconds(seconds);
}

Inbox::~Inbox() {
    if (is_named_) {
        unlink(path_.c_str());
    }
    if (base_ != nullptr) {
        munmap(base_, num_bytes_);
    }
    if (fd_ >= 0) {
        close(fd_);
    }
}

void Inbox::map(int num_ranks) {
    capacity_ = ring_bytes();
    num_bytes_ = kPageBytes + static_cast<size_t>(num_ranks) * (kPageBytes + capacity_);
    void* const base = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (base == MAP_FAILED) {
        fail("cannot map " + path_);
    }
    base_ = static_cast<char*>(base);
}

void Inbox::create(const std::string& path, int num_ranks) {
    path_ = path;
    const std::string partial = path + ".partial";
    fd_ = ::open(partial.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd_ < 0) {
        fail("cannot create " + partial);
    }
    const size_t bytes = kPageBytes + static_cast<size_t>(num_ranks) * (kPageBytes + ring_bytes());
    struct flock lock = whole_file(F_WRLCK);
    const int code = posix_fallocate(fd_, 0, static_cast<off_t>(bytes));
    if (code != 0 || fcntl(fd_, F_OFD_SETLK, &lock) != 0 ||
        rename(partial.c_str(), path.c_str()) != 0) {
        errno = code != 0 ? code : errno;
        const int reason = errno;
        unlink(partial.c_str());
        errno = reason;
        fail("cannot prepare " + path + " of " + std::to_string(bytes) + " bytes");
    }
    is_named_ = true;
    map(num_ranks);
    header().mapped.store(1, std::memory_order_relaxed);
    // ORDER: pairs with the acquire in open
    header().magic.store(kMagic, std::memory_order_release);
}

void Inbox::open(const std::string& path, int num_ranks, Clock::time_point deadline) {
    path_ = path;
    while ((fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC)) < 0) {
        if (errno != ENOENT || Clock::now() > deadline) {
            fail("cannot open " + path);
        }
        std::this_thread::sleep_for(kPoll);
    }
    map(num_ranks);
    // ORDER: pairs with the release in create
    while (header().magic.load(std::memory_order_acquire) != kMagic) {
        if (Clock::now() > deadline) {
            throw std::runtime_error(path + " is not prepared in time");
        }
        std::this_thread::sleep_for(kPoll);
    }
    header().mapped.fetch_add(1, std::memory_order_relaxed);
}

void Inbox::publish(int num_ranks, Clock::time_point deadline) {
    while (header().mapped.load(std::memory_order_relaxed) < static_cast<uint32_t>(num_ranks)) {
        if (Clock::now() > deadline) {
            throw std::runtime_error(path_ + " is not mapped by all ranks in time");
        }
        std::this_thread::sleep_for(kPoll);
    }
    unlink(path_.c_str());
    is_named_ = false;
}

bool Inbox::is_gone() const {
    struct flock lock = whole_file(F_WRLCK);
    return fcntl(fd_, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

Ring Inbox::ring(int source) const {
    char* const begin = base_ + kPageBytes + static_cast<size_t>(source) * (kPageBytes + capacity_);
    return {reinterpret_cast<RingControl*>(begin), begin + kPageBytes, capacity_};
}

}  // namespace loopback
