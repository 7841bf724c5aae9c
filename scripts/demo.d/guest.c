/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The whole user space of the demo's guest: process 1, statically linked, in an initramfs with
 * nothing but a few kernel modules.
 *
 * It counts, TICKS times a second: first in COUNTERS pages spread over its memory, then on its
 * disk, then on its serial line. Before a counter is advanced it must hold the count before; so a
 * snapshot whose memory and disk are of two moments is found out at the next tick, as is one whose
 * memory pages are.
 *
 * On the serial line it prints `count N`, and takes two commands: `check` reads back every byte of
 * its memory area and its disk; `ruin` fills both with garbage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum { TICKS = 20, COUNTERS = 256, PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), CHUNK = 1 << 20 };

static int serial = -1, disk = -1;
static uint64_t *memory;      /* counter pages, spread evenly among pages of a pattern */
static size_t memory_pages;   /* a multiple of COUNTERS */
static uint64_t disk_bytes;   /* block 0 has the counter, the rest the pattern */
static uint64_t *chunk;       /* aligned, for O_DIRECT */

static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    if (write(serial, line, length) < 0 || tcdrain(serial) < 0)
        pause();
}

#define fail(...) do { say("failed: " __VA_ARGS__); for (;;) pause(); } while (0)

/* Never zero and never the same: a memory image contains every page of it. */
static uint64_t pattern(uint64_t place)
{
    uint64_t mixed = (place + 1) * 0x9E3779B97F4A7C15u;

    return mixed ^ (mixed >> 29) ^ 1u << 31;
}

static uint64_t *counter_page(size_t index)
{
    return memory + index * (memory_pages / COUNTERS) * WORDS;
}

static void load_module(const char *name)
{
    char path[128];
    int file;

    snprintf(path, sizeof(path), "/modules/%s.ko", name);
    file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 && errno == ENOENT)
        return; /* built into this kernel */
    if (file < 0 || (syscall(SYS_finit_module, file, "", 0) < 0 && errno != EEXIST))
        fail("module %s: %s", name, strerror(errno));
    close(file);
}

static void open_serial(void)
{
    struct termios raw;

    serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (serial < 0 || tcgetattr(serial, &raw) < 0)
        exit(1);
    cfmakeraw(&raw);
    tcsetattr(serial, TCSANOW, &raw);
}

static void open_disk(void)
{
    for (int tries = 0; tries < 500; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT | O_SYNC | O_CLOEXEC);
        if (disk >= 0)
            break;
        usleep(10000);
    }
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &disk_bytes) < 0 || disk_bytes < CHUNK ||
        disk_bytes % CHUNK)
        fail("disk: %s", strerror(errno));
}

static void move_chunk(uint64_t offset, size_t bytes, int writing)
{
    ssize_t moved =
        writing ? pwrite(disk, chunk, bytes, offset) : pread(disk, chunk, bytes, offset);

    if (moved != (ssize_t)bytes)
        fail("disk at %llu: %s", (unsigned long long)offset, strerror(errno));
}

static uint64_t disk_counter(void)
{
    move_chunk(0, PAGE, 0);
    return chunk[0];
}

static void set_disk_counter(uint64_t count)
{
    memset(chunk, 0, PAGE);
    chunk[0] = count;
    move_chunk(0, PAGE, 1);
}

static void fill_memory(uint64_t salt)
{
    for (size_t word = 0; word < memory_pages * WORDS; word++)
        memory[word] = pattern(word) ^ salt;
}

static void fill_disk(uint64_t salt)
{
    for (uint64_t offset = 0; offset < disk_bytes; offset += CHUNK) {
        for (size_t word = 0; word < CHUNK / sizeof(*chunk); word++)
            chunk[word] = pattern(offset + word) ^ salt;
        move_chunk(offset, CHUNK, 1);
    }
}

static void prepare(void)
{
    struct sysinfo machine;

    open_disk();
    sysinfo(&machine);
    memory_pages = machine.totalram * machine.mem_unit / 2 / PAGE / COUNTERS * COUNTERS;
    memory =
        mmap(NULL, memory_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    chunk = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || chunk == MAP_FAILED || mlock(memory, memory_pages * PAGE) < 0)
        fail("memory: %s", strerror(errno));
    fill_memory(0);
    for (size_t index = 0; index < COUNTERS; index++)
        counter_page(index)[0] = 0;
    fill_disk(0);
    set_disk_counter(0);
}

static void tick(uint64_t count)
{
    for (size_t index = 0; index < COUNTERS; index++) {
        if (counter_page(index)[0] != count - 1)
            fail("torn: memory page %zu has %llu, not %llu", index,
                 (unsigned long long) counter_page(index)[0], (unsigned long long) count - 1);
        counter_page(index)[0] = count;
    }
    if (disk_counter() != count - 1)
        fail("torn: the disk has %llu, not %llu", (unsigned long long) chunk[0],
             (unsigned long long) count - 1);
    set_disk_counter(count);
    say("count %llu", (unsigned long long)count);
}

static void check(uint64_t count)
{
    size_t spread = memory_pages / COUNTERS * WORDS;

    for (size_t word = 0; word < memory_pages * WORDS; word++)
        if (memory[word] != (word % spread ? pattern(word) : count))
            fail("memory is damaged at byte %zu", word * sizeof(*memory));
    if (disk_counter() != count)
        fail("the disk has %llu, not %llu", (unsigned long long) chunk[0],
             (unsigned long long) count);
    for (uint64_t offset = 0; offset < disk_bytes; offset += CHUNK) {
        move_chunk(offset, CHUNK, 0);
        for (size_t word = offset ? 0 : WORDS; word < CHUNK / sizeof(*chunk); word++)
            if (chunk[word] != pattern(offset + word))
                fail("the disk is damaged at byte %llu", (unsigned long long)offset);
    }
    say("intact memory %zu disk %llu", memory_pages * PAGE, (unsigned long long)disk_bytes);
}

static void ruin(void)
{
    fill_memory(UINT64_MAX);
    fill_disk(UINT64_MAX);
    say("ruined memory %zu disk %llu", memory_pages * PAGE, (unsigned long long)disk_bytes);
    for (;;)
        pause();
}

/* Sleeps until the next tick, or until a command has arrived, one in each line. */
static void wait_for_tick(uint64_t count)
{
    static struct timespec next;
    static char line[16];
    static size_t length;
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    next.tv_nsec += 1000000000 / TICKS;
    if (next.tv_nsec >= 1000000000) {
        next.tv_nsec -= 1000000000;
        next.tv_sec++;
    }
    if (next.tv_sec < now.tv_sec || (next.tv_sec == now.tv_sec && next.tv_nsec < now.tv_nsec))
        next = now; /* late: skips ticks instead of catching up */
    for (;;) {
        struct pollfd readable = { .fd = serial, .events = POLLIN };
        int64_t left;
        char byte;

        clock_gettime(CLOCK_MONOTONIC, &now);
        left = (next.tv_sec - now.tv_sec) * 1000 + (next.tv_nsec - now.tv_nsec) / 1000000;
        if (left <= 0 || poll(&readable, 1, left) <= 0)
            return;
        if (read(serial, &byte, 1) != 1)
            continue;
        if (byte != '\n') {
            if (length < sizeof(line) - 1)
                line[length++] = byte;
            continue;
        }
        line[length] = 0;
        length = 0;
        if (!strcmp(line, "check"))
            check(count);
        else if (!strcmp(line, "ruin"))
            ruin();
    }
}

int main(void)
{
    static const char *const modules[] = {
        "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
        "virtio_blk"
    };

    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    open_serial();
    for (size_t index = 0; index < sizeof(modules) / sizeof(*modules); index++)
        load_module(modules[index]);
    prepare();
    for (uint64_t count = 1;; count++) {
        tick(count);
        wait_for_tick(count);
    }
}
