// SPDX-License-Identifier: Apache-2.0
#include "cpu/segment.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <random>
#include <system_error>

#include "common/error.hpp"

namespace deepcomm::cpu {

namespace {

constexpr const char* kDirectory = "/dev/shm";
constexpr const char* kPrefix = "deepcomm-";

std::string fresh_name() {
    std::random_device device;
    return format("/%s%d-%08x%08x", kPrefix, getpid(), device(), device());
}

constexpr double kMiB = 1024.0 * 1024.0;

/// Opens a new segment under a shared lock, which says that its owner lives. Returns its descriptor.
int create_locked(std::string& name) {
    while (true) {
        name = fresh_name();
        const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
        if (fd < 0) {
            throw CommError(format("shared memory: cannot create /dev/shm%s: %s", name.c_str(),
                                   std::strerror(errno)),
                            -1);
        }
        struct stat status{};
        const bool locked = flock(fd, LOCK_SH | LOCK_NB) == 0;
        if (locked && fstat(fd, &status) == 0 && status.st_nlink > 0) {
            return fd;
        }
        ::close(fd);  // between the two calls another process took it for a dead one's
    }
}

/// A prefix and a process number; probes of the topology have a word there, and no lock.
bool is_segment_name(const std::string& name) {
    const std::string prefix = kPrefix;
    return name.size() > prefix.size() && name.compare(0, prefix.size(), prefix) == 0 &&
           std::isdigit(static_cast<unsigned char>(name[prefix.size()])) != 0;
}

void remove_if_stale(const std::string& name) {
    const int fd = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) {  // gone by now, or another user's
        return;
    }
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
        shm_unlink(name.c_str());
    }
    ::close(fd);
}

}  // namespace

void Segment::remove_stale() {
    std::error_code failure;
    std::filesystem::directory_iterator entries(kDirectory, failure);
    for (; !failure && entries != std::filesystem::directory_iterator();
         entries.increment(failure)) {
        const std::string name = entries->path().filename().string();
        if (is_segment_name(name)) {
            remove_if_stale("/" + name);
        }
    }
}

std::shared_ptr<Segment> Segment::create(int64_t num_bytes) {
    remove_stale();
    std::string name;
    const int fd = create_locked(name);
    if (ftruncate(fd, num_bytes) != 0) {
        const int code = errno;
        ::close(fd);
        shm_unlink(name.c_str());
        throw CommError(
            format("shared memory: cannot size /dev/shm%s to %lld bytes: %s", name.c_str(),
                   static_cast<long long>(num_bytes), std::strerror(code)),
            -1);
    }
    return std::shared_ptr<Segment>(new Segment(name, fd, num_bytes, true));
}

std::shared_ptr<Segment> Segment::open(const std::string& name, int64_t num_bytes) {
    const int fd = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) {
        throw CommError(format("shared memory: cannot open a peer's /dev/shm%s: %s", name.c_str(),
                               std::strerror(errno)),
                        -1);
    }
    return std::shared_ptr<Segment>(new Segment(name, fd, num_bytes, false));
}

Segment::Segment(std::string name, int fd, int64_t num_bytes, bool owner)
    : name_(std::move(name)), fd_(fd), num_bytes_(num_bytes), linked_(owner) {
    void* const address = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_NORESERVE, fd_, 0);
    if (address == MAP_FAILED) {
        const int code = errno;
        ::close(fd_);
        unlink();
        throw CommError(format("shared memory: cannot map %.0f MiB: %s",
                               static_cast<double>(num_bytes) / kMiB, std::strerror(code)),
                        -1);
    }
    data_ = static_cast<std::byte*>(address);
    if (!owner) {  // only the owner reserves
        ::close(fd_);
        fd_ = -1;
    }
}

Segment::~Segment() {
    munmap(data_, static_cast<size_t>(num_bytes_));
    if (fd_ >= 0) {
        ::close(fd_);
    }
    unlink();
}

bool Segment::try_reserve(Range range) {
    // Where /dev/shm is full, ftruncate succeeds and the first touch is a SIGBUS; this fails here.
    int code = range.num_bytes == 0 ? 0 : EINTR;
    while (code == EINTR) {
        code = posix_fallocate(fd_, range.offset, range.num_bytes);
    }
    if (code == 0) {
        reserved_bytes_ += range.num_bytes;
    }
    return code == 0;
}

void Segment::release(Range range) {
    if (range.num_bytes > 0) {
        fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, range.offset, range.num_bytes);
        reserved_bytes_ -= range.num_bytes;
    }
}

void Segment::reserve(const std::vector<Range>& ranges) {
    size_t num_reserved = 0;
    while (num_reserved < ranges.size() && try_reserve(ranges[num_reserved])) {
        ++num_reserved;
    }
    if (num_reserved == ranges.size()) {
        return;
    }
    double needed = 0.0;
    for (const Range& range : ranges) {
        needed += static_cast<double>(range.num_bytes);
    }
    for (size_t index = 0; index < num_reserved; ++index) {
        release(ranges[index]);
    }
    struct statvfs status{};
    statvfs(kDirectory, &status);
    const double free_bytes =
        static_cast<double>(status.f_bavail) * static_cast<double>(status.f_frsize);
    throw CommError(
        format(
            "shared memory: /dev/shm is full: %.1f MiB needed, %.1f MiB free; mount a larger one "
            "(containers: --shm-size) or lower max_tokens_per_rank, num_generations or "
            "num_low_latency_slots",
            needed / kMiB, free_bytes / kMiB),
        -1);
}

void Segment::unlink() {
    if (linked_) {
        shm_unlink(name_.c_str());
        linked_ = false;
    }
}

}  // namespace deepcomm::cpu
